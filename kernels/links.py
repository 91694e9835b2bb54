"""Links: how the scores of one group become a loss and its derivative, one small function per family.

    value, dscore_K = link(score_K, valid_K, target_K, margin, p0, p1, p2, p3, p4, p5)

score_K holds the scores of the group's K members and 0 where valid_K is false (K is padded to a power of two);
target_K holds what each member should be (0 where the loss has no targets); margin is the group's scalar; p0..p5 are
hyper-parameters, run-time values. value is a scalar; dscore_K = dvalue/dscore_K is exactly 0 at padding. All is fp32.

A link runs inside the tail kernel (tail.py), which is compiled with it as a constant. Each file lists its links in
LINKS, with the number of members that a group of theirs has (where any will do, the 64 that are promised): from there
ahead-of-time compilation and its test take them.
"""

import triton

from . import list_links, pair_links, single_links

_FILES = (pair_links, single_links, list_links)
LINKS = tuple(entry for file in _FILES for entry in file.LINKS)  # (link, K)


def find(link: str | triton.JITFunction) -> triton.JITFunction:
    """The link of this name; a function is its own."""
    if not isinstance(link, str):
        return link
    for file in _FILES:
        if hasattr(file, link):
            return getattr(file, link)
    raise ValueError(f"there is no link {link!r}")


logistic, squared, negative = pair_links.logistic, pair_links.squared, single_links.negative
