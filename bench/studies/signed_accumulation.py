"""Whether a group too long for the workspace is worth 6NDV: `python -m bench.studies.signed_accumulation`.

Where a loss has its sum inside, dL/dlogp of a pair's tokens is one unknown number c, times +1 for the chosen response
and -1 for the rejected one. So dweight / c and dhidden / c can be added up as the logits go by, a chunk of rows at a
time, and multiplied by c once the last log-probability is known:

    signed      logits once, chunks of whole rows, an fp32 sum of dweight that every chunk adds to    6NDV
    recompute   what ships: logits of D rows kept where dweight will be, of the others computed again;
                tiles that need no whole rows                                                         7NDV here

Both are measured on one pair of 2,048 tokens, D = 1,024, in alternating rounds, after their results were compared. The
fewer rows fit a chunk, the more the sum costs: V x D numbers are read and written for each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import prefkern as pk
from bench import record
from bench.studies import common
from prefkern import group_local, planner
from prefkern import rows as torch_rows
from prefkern.head import Head, Operands

NAME = "signed_accumulation"
BETA = 0.1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Relative to the largest number of a gradient: what rounding its operands to the dtype leaves.
AGREE = {"fp32": 1e-4, "bf16": 3e-2}

Step = Callable[["Pair", int], "Results"]
Results = tuple[Tensor, Tensor, Tensor]  # loss, dhidden, dweight


@dataclass(frozen=True)
class Case:
    n: int
    d: int
    v: int
    dtype: str
    workspace: int  # bytes


@dataclass(frozen=True)
class Pair:
    """One pair of two equally long responses."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    labels: Tensor
    ref_logps: Tensor

    @classmethod
    def of(cls, case: Case) -> Pair:
        g = common.generator(NAME, case.n, case.d, case.v)
        hidden = torch.randn(case.n, case.d, generator=g)
        weight = torch.randn(case.v, case.d, generator=g) / case.d**0.5
        labels = torch.randint(0, case.v, (case.n,), generator=g)
        ref = pk.token_logps(hidden, weight, labels).logps
        ref += 0.02 * torch.randn(case.n, generator=g)
        dtype = DTYPES[case.dtype]
        return cls(hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels, ref)

    @property
    def layout(self) -> pk.Layout:
        half = len(self.labels) // 2
        return pk.Layout.pairs([half], [len(self.labels) - half])


def signed(pair: Pair, workspace: int) -> Results:
    """-log sigma(beta x) and its gradients, those of x multiplied by -beta sigma(-beta x) in the end."""
    operands = Operands(pair.hidden, pair.weight)
    (n, d), v = pair.hidden.shape, pair.weight.shape[0]
    plan = planner.plan(
        (n, d, v), pair.hidden.dtype, pair.hidden.device, grad_hidden=True, grad_head=True, workspace_bytes=workspace
    )
    step = plan.rows_per_chunk
    chunks = [slice(i, min(i + step, n)) for i in range(0, n, step)]
    sign = torch.ones(n)
    sign[n // 2 :] = -1
    rows = torch_rows.implementation(pair.hidden.device, pair.hidden.dtype)
    stats, unit = group_local.walk(
        operands, pair.labels, Head(), plan, {}, rows, chunks, lambda number, stats: sign[chunks[number]]
    )
    x = BETA * (sign * (stats.logps - pair.ref_logps)).sum()
    loss = group_local.Differentiated.apply(group_local.Known(x, unit), *operands)
    factor = -BETA * torch.sigmoid(-x)
    return -F.logsigmoid(x), *torch.autograd.grad(loss, (pair.hidden, pair.weight), factor)


def recompute(pair: Pair, workspace: int) -> Results:
    """The same by `token_logps`, which is not told of groups, and the tail."""
    logps = pk.token_logps(pair.hidden, pair.weight, pair.labels, workspace_bytes=workspace).logps
    loss = pk.preference_loss(logps, pair.layout, pk.losses.DPO(beta=BETA), ref_logps=pair.ref_logps).loss
    return loss.detach(), *torch.autograd.grad(loss, (pair.hidden, pair.weight))


STEPS: dict[str, Step] = {"signed": signed, "recompute": recompute}


def difference(pair: Pair, workspace: int) -> float:
    """Of the two gradients, the largest anywhere, relative to the largest number of each."""
    one, other = (step(pair, workspace)[1:] for step in STEPS.values())
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(one, other))


def measure(case: Case, rounds: int) -> record.Record:
    """Seconds of both, and their ratio.

    Raises:
        ArithmeticError: they do not compute the same.
    """
    pair = Pair.of(case)
    apart = difference(pair, case.workspace)
    if not apart <= AGREE[case.dtype]:
        raise ArithmeticError(f"{case}: the gradients differ by {apart:.1e}")
    times: dict[str, list[float]] = {name: [] for name in STEPS}
    for _ in range(rounds):
        for name, step in STEPS.items():
            start = time.perf_counter()
            step(pair, case.workspace)
            times[name].append(time.perf_counter() - start)
    rows = planner.plan(
        (case.n, case.d, case.v), DTYPES[case.dtype], pair.hidden.device, grad_hidden=True, grad_head=True,
        workspace_bytes=case.workspace,
    ).rows_per_chunk  # fmt: skip
    seconds = {name: statistics.median(values) for name, values in times.items()}
    return {
        "shape": [case.n, case.d, case.v], "dtype": case.dtype, "workspace_mib": case.workspace / 2**20,
        "rows_per_chunk": rows, "difference": apart, "times_s": times, "p50_s": seconds,
        "signed_over_recompute": seconds["signed"] / seconds["recompute"],
    }  # fmt: skip


def cases(quick: bool) -> list[Case]:
    """Both dtypes, a small and a large vocabulary, the default workspace and a large one."""
    default = planner.default_workspace(torch.device("cpu"))
    n, d, vocabularies, large = (48, 16, (257,), 1 << 15) if quick else (2048, 1024, (32_064, 128_256), 128 << 20)
    workspaces = (1 << 13, large) if quick else (default, large)
    return [Case(n, d, v, dtype, w) for v in vocabularies for dtype in DTYPES for w in workspaces]


def table(records: Sequence[record.Record]) -> str:
    """One line a case, as Markdown."""
    flat = [
        {
            "V": r["shape"][2], "dtype": r["dtype"], "workspace, MiB": float(r["workspace_mib"]),
            "rows a chunk": r["rows_per_chunk"], "signed, s": r["p50_s"]["signed"],
            "recompute, s": r["p50_s"]["recompute"], "signed / recompute": r["signed_over_recompute"],
        }
        for r in records
    ]  # fmt: skip
    return common.markdown(flat)


def run(out: Path, quick: bool, rounds: int) -> list[record.Record]:
    """Measure every case, write NAME.json, print the table."""
    origin = record.provenance()
    records = [{**origin, **measure(case, rounds)} for case in cases(quick)]
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{NAME}.json").write_text("[\n" + ",\n".join(json.dumps(r) for r in records) + "\n]\n")
    print(table(records))
    return records


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m bench.studies.{NAME}", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="toy sizes, which show nothing; another folder")
    parser.add_argument("--rounds", type=int, default=5, help="of both in turn; the median is told")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the JSON is written")
    args = parser.parse_args(arguments)
    run(args.out or (common.SCRATCH / "quick" if args.quick else common.RESULTS), args.quick, args.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
