"""Segment lengths against the figures' examples, the index against a plain reading of the layout."""

import pytest
import torch

import prefkern as pk
from conftest import DEVICE


@pytest.mark.parametrize(
    "length, k, want", [(9, 2, (2, 2, 2, 2, 1)), (7, 2, (2, 2, 2, 1)), (9, 4, (4, 4, 1)), (7, 4, (4, 3))]
)
def test_static_windows_of_the_longest(length, k, want):
    layout = pk.Layout.pairs([length], [length]).static(k)
    assert layout.segment_lengths == (want, want)


def test_static_pads_the_shorter_with_empty_segments():
    assert pk.Layout.pairs([5], [9]).static(2).segment_lengths == ((2, 2, 1, 0, 0), (2, 2, 2, 2, 1))


@pytest.mark.parametrize(
    "length, m, want",
    [(5, 2, (2, 3)), (9, 2, (4, 5)), (7, 2, (3, 4)), (4, 2, (2, 2)), (5, 4, (1, 1, 1, 2)), (9, 4, (2, 2, 2, 3)),
     (7, 4, (1, 2, 2, 2)), (4, 4, (1, 1, 1, 1))],
)  # fmt: skip
@pytest.mark.parametrize("rule", ["A", "B"])
def test_adaptive_parts(length, m, want, rule):
    assert pk.Layout.pairs([length], [length]).adaptive(m, rule=rule).segment_lengths[0] == want


def test_adaptive_rules_differ_where_the_figure_is_silent():
    layout = pk.Layout.pairs([6], [6])
    assert layout.adaptive(4, rule="A").segment_lengths[0] == (1, 1, 2, 2)
    assert layout.adaptive(4, rule="B").segment_lengths[0] == (1, 2, 1, 2)


def test_adaptive_gives_short_responses_fewer_parts():
    assert pk.Layout.pairs([9, 7], [3, 0]).adaptive(4).segment_lengths == ((3, 3, 3), (1, 1, 1), (7,), (0,))


def test_split_at_positions():
    layout = pk.Layout.pairs([9], [4]).split_at([[3, 7], [2]])
    assert layout.segment_lengths == ((3, 4, 2), (2, 2, 0))
    with pytest.raises(ValueError, match="must not decrease"):
        pk.Layout.pairs([9], [4]).split_at([[7, 3], [2]])
    with pytest.raises(ValueError, match=r"\[0, 4\]"):
        pk.Layout.pairs([9], [4]).split_at([[3], [5]])
    with pytest.raises(ValueError, match="1 lists of boundaries for 2"):
        pk.Layout.pairs([9], [4]).split_at([[3]])


CUTS = {
    "uncut": lambda x: x,
    "static": lambda x: x.static(3),
    "adaptive": lambda x: x.adaptive(3),
    "prefix": lambda x: x.static(2, accumulate="prefix"),
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 3, 2), (6,)], ids=str)
def test_index_reads_the_layout(cut, sizes):
    layout = cut(pk.Layout.groups([7, 4, 9, 2, 0, 5], sizes))
    index = layout.index(DEVICE)
    segments = [tuple(s) for s in layout.segment_lengths or [(n,) for n in layout.lengths]]
    want, response, group = {}, 0, 0  # (group, member) -> rows
    starts = [sum(layout.lengths[:r]) for r in range(6)]
    for size in sizes:
        parts = len(segments[response])
        for i in range(parts):
            for k in range(size):
                r = response + k
                first = starts[r] + sum(segments[r][:i])
                want[group + i, k] = (first, first + segments[r][i])
        group, response = group + parts, response + size
    offsets = index.group_offsets.tolist()
    got = {
        (g, s - offsets[g]): (index.segment_start_S[s].item(), index.segment_end_S[s].item())
        for g in range(layout.num_groups)
        for s in range(offsets[g], offsets[g + 1])
    }
    assert {k: v for k, v in got.items() if v[0] != v[1]} == {k: v for k, v in want.items() if v[0] != v[1]}
    assert got.keys() == want.keys()
    chains = index.chain_offsets.tolist()
    assert len(chains) - 1 == (layout.num_prompts if layout.accumulate == "prefix" else layout.num_groups)
    counts = torch.bincount(index.chain_of_token_N, minlength=len(chains) - 1)
    assert torch.equal(counts, index.chain_tokens_C)
    assert index.max_group == max(sizes)


def test_index_is_built_once():
    layout = pk.Layout.pairs([3], [4])
    assert layout.index(DEVICE) is layout.index(DEVICE)


def test_index_is_built_on_the_host_whatever_the_default_device():
    want = pk.Layout.pairs([3, 5], [4, 0]).static(2).index("cpu")
    with torch.device("meta"):
        got = pk.Layout.pairs([3, 5], [4, 0]).static(2).index("cpu")
    assert all(torch.equal(a, b) for a, b in zip(got[:-2], want[:-2]))


def test_empty_batch():
    layout = pk.Layout.pairs([], [])
    assert (layout.num_tokens, layout.num_groups, layout.is_pairs) == (0, 0, True)
    assert layout.static(4).index("cpu").segment_start_S.numel() == 0


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: pk.Layout.pairs([1, 2], [3]), "2 chosen_lengths but 1"),
        (lambda: pk.Layout.pairs([-1], [3]), "negative"),
        (lambda: pk.Layout.groups([1, 2, 3], [2]), "add up to 2"),
        (lambda: pk.Layout.groups([1], [0, 1]), "at least 1"),
        (lambda: pk.Layout.pairs([3], [3]).static(0), "k=0"),
        (lambda: pk.Layout.pairs([3], [3]).static(1.5), "k=1.5 must be an integer"),
        (lambda: pk.Layout((3, 3), (2,), segment_lengths=((1, 2), (3, 1))), "do not add up"),
        (lambda: pk.Layout((3, 3), (2,), segment_lengths=((1, 2), (3,))), "the same number of segments"),
        (lambda: pk.Layout.pairs([3], [3]).static(1).static(1), "already"),
        (lambda: pk.Layout.pairs([3], [3]).adaptive(2, rule="C"), "'A' or 'B'"),
        (lambda: pk.Layout.pairs([3], [3]).static(1, accumulate="sum"), "'segment' or 'prefix'"),
    ],
)
def test_bad_layouts_are_named(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert words in str(error.value)
