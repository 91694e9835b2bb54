"""Where the responses, segments and groups of a packed batch lie."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Accumulate = Literal["segment", "prefix"]

_numbers = itertools.count()
_LIVE: weakref.WeakValueDictionary[int, Layout] = weakref.WeakValueDictionary()


class TailIndex(NamedTuple):
    """The layout as the tail kernels read it: int64 tensors on one device, views of one buffer.

    Segments are numbered in *group order*: the K segments that compete in one group are neighbours.
    A *chain* is a run of groups that one program walks in order: one group when segments stand for
    themselves, all groups of a prompt when scores are running prefix sums.
    """

    segment_start_S: Tensor  # first packed row of segment s
    segment_end_S: Tensor  # one past its last row; equal to the start where the segment is empty
    group_offsets: Tensor  # (G + 1,) segments of group g are [group_offsets[g], group_offsets[g + 1])
    chain_offsets: Tensor  # (C + 1,) groups of chain c are [chain_offsets[c], chain_offsets[c + 1])
    chain_of_token_N: Tensor  # chain that row n belongs to
    chain_tokens_C: Tensor  # number of rows of chain c
    response_of_segment_S: Tensor
    group_of_segment_S: Tensor
    prompt_of_group_G: Tensor
    response_offsets: Tensor  # (R + 1,) rows of response r
    token_order_S: Tensor  # token_order_S[i] is the group-order number of the i-th segment in row order
    row_order_offsets: Tensor  # (S + 1,) rows of the i-th segment in row order
    response_segments: Tensor  # (R + 1,) segments, in row order, of response r
    parts_of_group_G: Tensor  # number of groups of the same prompt
    max_group: int  # largest K; 2 where there is no group, so that a pair loss finds its two columns
    prefix: bool

    def reordered(self, order_S: Tensor) -> TailIndex:
        """The index of the same groups with other members: place s holds what was segment order_S[s].

        For `tail` and the eager functions; `chain_of_token_N` no longer fits, so `fused_logits` cannot take it.
        """
        place_S = torch.empty_like(order_S).index_copy(0, order_S, torch.arange(len(order_S), device=order_S.device))
        return self._replace(
            segment_start_S=self.segment_start_S[order_S],
            segment_end_S=self.segment_end_S[order_S],
            response_of_segment_S=self.response_of_segment_S[order_S],
            token_order_S=place_S[self.token_order_S],
        )


class Part(NamedTuple):
    """Some neighbouring prompts of a layout, and where they lie in it."""

    layout: Layout  # of them alone
    rows: slice
    responses: slice


@dataclass(frozen=True)
class Layout:
    """Packed responses, cut into segments, the segments gathered into groups.

    Rows of `hidden`, `labels` and `logps` hold the response tokens of response 0, then of response 1, and so
    on, with no padding and no prompt. The responses of one prompt are neighbours: chosen before rejected in a
    pair. Every response of a prompt has the same number of segments (some may be empty), and the i-th segments
    of a prompt's responses form one group. An uncut layout has one segment per response and one group per prompt.

    Build one with `Layout.pairs`, `Layout.groups` or `Layout.sequences`; cut it with `static`, `adaptive` or
    `split_at`. It lives on the host; `index(device)` copies it to a device once, in one transfer.

    Under torch.compile build it outside and pass it in: there its `handle`, a 0-dim int64 tensor on the host, stands
    for it, so that no number in it becomes a constant of the graph.
    """

    lengths: tuple[int, ...]  # tokens of each response
    group_sizes: tuple[int, ...]  # responses of each prompt
    segment_lengths: tuple[tuple[int, ...], ...] | None = None  # per response, None where uncut
    accumulate: Accumulate = "segment"
    _device_index: dict = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if any(n < 0 for n in self.lengths):
            raise ValueError(f"lengths must not be negative: {min(self.lengths)}")
        if any(k < 1 for k in self.group_sizes):
            raise ValueError(f"group_sizes must be at least 1: {min(self.group_sizes)}")
        if sum(self.group_sizes) != len(self.lengths):
            raise ValueError(
                f"group_sizes add up to {sum(self.group_sizes)}, but there are {len(self.lengths)} lengths"
            )
        if self.segment_lengths is not None:
            self._check_segments()
        if self.accumulate not in ("segment", "prefix"):
            raise ValueError(f"accumulate={self.accumulate!r} must be 'segment' or 'prefix'")
        number = next(_numbers)
        _LIVE[number] = self
        with torch.inference_mode(False):
            object.__setattr__(self, "handle", torch.tensor(number, device="cpu"))

    def __reduce__(self):
        return Layout, (self.lengths, self.group_sizes, self.segment_lengths, self.accumulate)  # a handle of its own

    def _check_segments(self) -> None:
        if tuple(map(sum, self.segment_lengths)) != self.lengths:
            raise ValueError("segment_lengths do not add up to the responses' lengths")
        for first, size in zip(self.prompt_starts, self.group_sizes):
            if len({len(segments) for segments in self.segment_lengths[first : first + size]}) > 1:
                raise ValueError("the responses of a prompt must have the same number of segments")

    @staticmethod
    def of_handle(handle: Tensor) -> Layout:
        """The layout whose `handle` this is.

        Raises:
            RuntimeError: nothing refers to that layout any more.
        """
        layout = _LIVE.get(int(handle))
        if layout is None:
            raise RuntimeError("the layout of this call is gone; keep a reference to it until the call has returned")
        return layout

    # --- building ---------------------------------------------------------------------------------------------

    @classmethod
    def pairs(cls, chosen_lengths: Sequence[int], rejected_lengths: Sequence[int]) -> Layout:
        """Layout of preference pairs, packed as chosen 0, rejected 0, chosen 1, rejected 1, ...

        Args:
            chosen_lengths, rejected_lengths: (P,) response lengths in tokens, on the host.
        Raises:
            ValueError: the two differ in length, or a length is negative.
        """
        chosen, rejected = _ints(chosen_lengths), _ints(rejected_lengths)
        if len(chosen) != len(rejected):
            raise ValueError(f"{len(chosen)} chosen_lengths but {len(rejected)} rejected_lengths")
        return cls(tuple(n for pair in zip(chosen, rejected) for n in pair), (2,) * len(chosen))

    @classmethod
    def groups(cls, lengths: Sequence[int], group_sizes: Sequence[int]) -> Layout:
        """Layout of prompts with several responses each (listwise), group sizes free.

        Args:
            lengths: (R,) response lengths in tokens, the responses of one prompt next to each other.
            group_sizes: (P,) responses of each prompt; they add up to R.
        """
        return cls(_ints(lengths), _ints(group_sizes))

    @classmethod
    def sequences(cls, lengths: Sequence[int]) -> Layout:
        """Layout of responses that stand alone: every group has one member."""
        lengths = _ints(lengths)
        return cls(lengths, (1,) * len(lengths))

    # --- cutting ----------------------------------------------------------------------------------------------

    def static(self, k: int, *, accumulate: Accumulate = "segment") -> Layout:
        """Cut every response into windows of k tokens; a prompt has ceil(max length / k) segments.

        The last window of the longest response may be shorter; windows past the end of a shorter response are
        empty and score 0, as if it were padded with tokens of log-ratio 0.

        Source: xi_static of Autoregressive DPO, arXiv:2602.09533 (its figure; the padding's log-ratio is our choice).
        Raises:
            ValueError: k < 1, or the layout is cut already.
        """
        check_count("k", k)
        return self._cut(lambda lengths: [_windows(n, k, max(lengths)) for n in lengths], accumulate)

    def adaptive(self, m: int, *, rule: Literal["A", "B"] = "A", accumulate: Accumulate = "segment") -> Layout:
        """Cut every response into m nearly equal parts; part i of one is compared with part i of the others.

        Rule A gives floor(T/m) tokens to the first parts and one more to the last T mod m. Rule B cuts at
        floor(i*T/m). A prompt whose shortest response has fewer than m tokens gets that many parts (at least one).

        Source: xi_adaptive of Autoregressive DPO, arXiv:2602.09533; its figure fits both rules; short responses
        are our choice.
        Raises:
            ValueError: m < 1, rule not "A" or "B", or the layout is cut already.
        """
        check_count("m", m)
        if rule not in ("A", "B"):
            raise ValueError(f"rule={rule!r} must be 'A' or 'B'")
        part = _parts_a if rule == "A" else _parts_b
        return self._cut(lambda lengths: [part(n, max(1, min(m, *lengths))) for n in lengths], accumulate)

    def split_at(self, boundaries: Sequence[Sequence[int]], *, accumulate: Accumulate = "segment") -> Layout:
        """Cut every response at given positions, counted in tokens from its start.

        Args:
            boundaries: (R,) lists of interior cut positions, each non-decreasing, within [0, length]. [3, 7] cuts
                a response of 9 tokens into 3, 4 and 2. Responses of one prompt with fewer cuts get empty segments
                at the end.
        Raises:
            ValueError: one list per response is not given, a list decreases or leaves the response, or the layout
                is cut already.
        """
        if len(boundaries) != len(self.lengths):
            raise ValueError(f"{len(boundaries)} lists of boundaries for {len(self.lengths)} responses")
        cuts = iter([_ints(b) for b in boundaries])
        pieces = [_pieces(n, next(cuts), r) for r, n in enumerate(self.lengths)]
        rows = iter(pieces)

        def take(lengths: Sequence[int]) -> list[tuple[int, ...]]:
            mine = [next(rows) for _ in lengths]
            most = max(len(p) for p in mine)
            return [p + (0,) * (most - len(p)) for p in mine]

        return self._cut(take, accumulate)

    def _cut(self, cut_prompt, accumulate: Accumulate) -> Layout:
        if self.is_cut:
            raise ValueError("this layout is cut into segments already; cut the uncut layout")
        segments: list[tuple[int, ...]] = []
        for first, size in zip(self.prompt_starts, self.group_sizes):
            segments += cut_prompt(self.lengths[first : first + size])
        return replace(self, segment_lengths=tuple(segments), accumulate=accumulate, _device_index={})

    # --- reading ----------------------------------------------------------------------------------------------

    @property
    def is_cut(self) -> bool:
        """Whether static, adaptive or split_at made this layout (even if into one segment each)."""
        return self.segment_lengths is not None

    @cached_property
    def uncut(self) -> Layout:
        """The same responses, whole."""
        return Layout(self.lengths, self.group_sizes) if self.is_cut else self

    @property
    def num_tokens(self) -> int:
        """N, packed rows."""
        return sum(self.lengths)

    @property
    def num_prompts(self) -> int:
        """P, prompts (pairs, lists or single sequences)."""
        return len(self.group_sizes)

    @property
    def num_responses(self) -> int:
        """R."""
        return len(self.lengths)

    @property
    def segments_per_response(self) -> tuple[int, ...]:
        """(R,) segments that each response is cut into."""
        return tuple(len(s) for s in self._segments)

    @property
    def segments_per_prompt(self) -> tuple[int, ...]:
        """(P,) segments that each response of the prompt is cut into."""
        return tuple(len(self._segments[first]) for first in self.prompt_starts)

    @property
    def num_groups(self) -> int:
        """G, comparisons: one per prompt and segment."""
        return sum(self.segments_per_prompt)

    @property
    def num_segments(self) -> int:
        """S."""
        return sum(len(s) for s in self._segments)

    @property
    def is_pairs(self) -> bool:
        """Whether every prompt has exactly two responses."""
        return all(k == 2 for k in self.group_sizes)

    @cached_property
    def has_empty_group(self) -> bool:
        """Whether some group holds no token at all."""
        start, end, group_offsets, *_ = self._host_index
        tokens_before = _offsets(end - start)[group_offsets]
        return bool((tokens_before.diff() == 0).any())

    @cached_property
    def _segments(self) -> tuple[tuple[int, ...], ...]:
        return self.segment_lengths if self.is_cut else tuple((n,) for n in self.lengths)

    @cached_property
    def prompt_starts(self) -> tuple[int, ...]:
        """(P,) number of each prompt's first response."""
        return tuple(itertools.accumulate(self.group_sizes, initial=0))[:-1]

    @cached_property
    def rows_per_prompt(self) -> tuple[int, ...]:
        """(P,) packed rows of each prompt."""
        return tuple(sum(self.lengths[i : i + k]) for i, k in zip(self.prompt_starts, self.group_sizes))

    def runs(self, max_rows: int) -> list[slice]:
        """The prompts in order, in runs of as many whole ones as have at most max_rows rows; a longer one is alone."""
        edges, rows = [], max_rows + 1
        for prompt, more in enumerate(self.rows_per_prompt):
            rows += more
            if rows > max_rows:
                edges.append(prompt)
                rows = more
        return [slice(a, b) for a, b in itertools.pairwise([*edges, self.num_prompts])]

    def prompts(self, run: slice) -> Part:
        """The prompts run.start to run.stop, cut as they are here; kept for the next call, as `index` is."""
        key = run.start, run.stop
        if key not in self._parts:
            self._parts[key] = self._prompts(run)
        return self._parts[key]

    @cached_property
    def _parts(self) -> dict[tuple[int, int], Part]:
        return {}

    def _prompts(self, run: slice) -> Part:
        if run.start == 0 and run.stop == self.num_prompts:
            return Part(self, slice(0, self.num_tokens), slice(0, self.num_responses))
        starts = (*self.prompt_starts, self.num_responses)
        responses = slice(starts[run.start], starts[run.stop])
        first = sum(self.lengths[: responses.start])
        lengths = self.lengths[responses]
        segments = self.segment_lengths[responses] if self.is_cut else None
        part = replace(
            self, lengths=lengths, group_sizes=self.group_sizes[run], segment_lengths=segments, _device_index={}
        )
        return Part(part, slice(first, first + sum(lengths)), responses)

    def index(self, device: torch.device | str) -> TailIndex:
        """The layout on a device, copied there in one transfer and kept for the next call."""
        device = torch.device(device)
        if device not in self._device_index:
            self._device_index[device] = self._build_index(device)
        return self._device_index[device]

    def _build_index(self, device: torch.device) -> TailIndex:
        parts = self._host_index
        packed = torch.cat(parts)
        if device.type == "cuda":
            packed = packed.pin_memory()
        views = packed.to(device, non_blocking=True).split([len(part) for part in parts])
        return TailIndex(*views, max_group=max(self.group_sizes, default=2), prefix=self.accumulate == "prefix")

    @cached_property
    def _host_index(self) -> list[Tensor]:
        """The tensors of TailIndex, in its order."""
        with torch.device("cpu"):  # also where torch.set_default_device says otherwise
            return self._build_host_index()

    def _build_host_index(self) -> list[Tensor]:
        lengths = torch.tensor([n for segments in self._segments for n in segments], dtype=torch.int64)  # in row order
        sizes_P, parts_P = _tensor(self.group_sizes), _tensor(self.segments_per_prompt)
        parts_R = parts_P.repeat_interleave(sizes_P)
        response_segments, row_order_offsets = _offsets(parts_R), _offsets(lengths)
        # Of each segment in row order: its response, prompt, which part it is, its group, its number in group order.
        response = torch.arange(len(parts_R)).repeat_interleave(parts_R)
        prompt = torch.arange(len(sizes_P)).repeat_interleave(sizes_P)[response]
        part = torch.arange(len(lengths)) - response_segments[response]
        group = _offsets(parts_P)[prompt] + part
        member = response - _offsets(sizes_P)[prompt]
        order = _offsets(parts_P * sizes_P)[prompt] + part * sizes_P[prompt] + member

        prompt_of_group = torch.arange(len(parts_P)).repeat_interleave(parts_P)
        if self.accumulate == "prefix":
            chain_of_group, chain_offsets = prompt_of_group, _offsets(parts_P)
        else:
            chain_of_group, chain_offsets = torch.arange(len(prompt_of_group)), torch.arange(len(prompt_of_group) + 1)
        chain = chain_of_group[group]

        def in_group_order(values: Tensor) -> Tensor:
            return torch.empty_like(values).index_copy_(0, order, values)

        return [
            in_group_order(row_order_offsets[:-1]),
            in_group_order(row_order_offsets[1:]),
            _offsets(sizes_P.repeat_interleave(parts_P)),
            chain_offsets,
            chain.repeat_interleave(lengths),
            torch.zeros(len(chain_offsets) - 1, dtype=torch.int64).index_add_(0, chain, lengths),
            in_group_order(response),
            in_group_order(group),
            prompt_of_group,
            _offsets(_tensor(self.lengths)),
            order,
            row_order_offsets,
            response_segments,
            parts_P.repeat_interleave(parts_P),
        ]


def _ints(values: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(v) for v in values)


def _tensor(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _offsets(sizes: Tensor) -> Tensor:
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


def check_count(name: str, value: int) -> None:
    """Raise ValueError unless value is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer of at least 1")


def _windows(length: int, k: int, longest: int) -> tuple[int, ...]:
    count = max(1, -(-longest // k))
    whole, rest = divmod(length, k)
    windows = (k,) * whole + (rest,) * (rest > 0)
    return windows + (0,) * (count - len(windows))


def _parts_a(length: int, m: int) -> tuple[int, ...]:
    base, longer = divmod(length, m)
    return (base,) * (m - longer) + (base + 1,) * longer


def _parts_b(length: int, m: int) -> tuple[int, ...]:
    return tuple((i + 1) * length // m - i * length // m for i in range(m))


def _pieces(length: int, cuts: tuple[int, ...], response: int) -> tuple[int, ...]:
    edges = (0, *cuts, length)
    if any(a > b for a, b in zip(edges, edges[1:])):
        raise ValueError(
            f"boundaries of response {response}, {list(cuts)}, must not decrease and must lie in [0, {length}]"
        )
    return tuple(b - a for a, b in zip(edges, edges[1:]))
