"""The committed table of ahead-of-time compilations: what every kernel takes on every architecture, and its roofline.

    python -m prefkern.kernels.aot_table bench/results/aot      writes aot.jsonl and aot.md: `make aot`

A line is a specialisation on an architecture in a dtype: its configuration, registers, spills, memory, instructions,
the occupancy that follows, and for the reference launches bytes, FLOPs and the time that roofline.py predicts. It
carries a fingerprint of all that the compiler is given, so that a test sees without compiling that it is out of date.
"""

import argparse
import ast
import functools
import hashlib
import inspect
import io
import json
import multiprocessing
import os
import textwrap
import tokenize
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import triton
import triton.language as tl

from .aot import DTYPES, Report, compile_for, specializations
from .roofline import BOARDS, ROWS, kernel_name, launch_sizes, occupancy, operands, predict, work
from .tuning import ARCHS, Arch, Specialization

COMMAND = "make aot"
FIGURES = tuple(field.name for field in fields(Report) if field.name not in ("name", "arch"))
Line = dict[str, Any]


def line(spec: Specialization, arch: Arch, dtype: str, report: Report, triton_version: str) -> Line:
    """One line of the table; all of it but the report's figures and the version follows from the specialisation."""
    board = BOARDS[arch.name]
    held = occupancy(
        board, registers=report.registers, shared=report.shared, tensor_memory=report.tensor_memory,
        warps=spec.num_warps,
    )  # fmt: skip
    blocks = {name: size for name, size in spec.constexprs.items() if name.startswith(("BLOCK_", "TILE_", "GROUP_"))}
    return {
        "name": spec.name, "arch": arch.name, "dtype": dtype, "board": board.name, "triton": triton_version,
        "fingerprint": fingerprint(spec),
        "config": blocks | {"num_warps": spec.num_warps, "num_stages": spec.num_stages} | spec.limits,
        **{name: getattr(report, name) for name in FIGURES},
        "blocks_per_processor": held.blocks, "occupancy": held.fraction, "occupancy_limit": held.limit,
        "launches": [_launch(spec, arch, dtype, N, held) for N in _launch_rows(spec)],
    }  # fmt: skip


def _launch_rows(spec: Specialization) -> tuple[int, ...]:
    """Its own N if it is for one; the tail is over in microseconds whatever N, so one will do there, too."""
    if "N" in spec.sizes:
        return (spec.sizes["N"],)
    return ROWS[:1] if kernel_name(spec) == "tail_kernel" else ROWS


def _launch(spec, arch, dtype: str, N: int, held) -> Line:
    load, known = work(spec, arch, N), launch_sizes(spec, arch, N)
    used = {letter for extent, _ in operands(spec) for letter in extent}
    sizes = {letter: size for letter, size in known.items() if letter in used}
    prediction = predict(BOARDS[arch.name], load, held, 32 if dtype == "fp32" else 16)
    return {
        "sizes": sizes, "programs": load.programs, "flops": load.flops, "bytes": load.bytes,
        "waves": _rounded(prediction.waves), "bound": prediction.bound,
        "roof_us": _rounded(1e6 * prediction.roof), "predicted_us": _rounded(1e6 * prediction.predicted),
    }  # fmt: skip


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def fingerprint(spec: Specialization) -> str:
    """Hash of what the compiler is given: code of kernel and helpers, types, constants, options; not the comments."""
    sources: dict[str, str] = {}
    _collect(spec.kernel, sources)
    constants = {}
    for name, value in spec.constexprs.items():
        constants[name] = _collect(value, sources) if _is_kernel(value) else value
    options = [spec.num_warps, spec.num_stages, spec.limits]
    given = [sources, spec.signature, constants, sorted(spec.divisible), options]
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]


def _is_kernel(value: Any) -> bool:
    """Whether it was made by triton.jit here, to be compiled or to be interpreted."""
    function = getattr(value, "fn", None)
    return inspect.isfunction(function) and not function.__module__.startswith("triton.")


def _collect(kernel: Any, sources: dict[str, str]) -> str:
    """Add the code of a jit function, and of what it names, to `sources`; returns its name there."""
    function = kernel.fn
    name = f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}"
    if name not in sources:
        sources[name], mentioned = _code(function)
        for other in mentioned:
            value = function.__globals__.get(other)
            if _is_kernel(value):
                _collect(value, sources)
            elif isinstance(value, (int, float, str, list, tuple, tl.constexpr)):
                sources[f"{name}: {other}"] = repr(getattr(value, "value", value))
    return name


@functools.cache
def _code(function: Callable) -> tuple[str, tuple[str, ...]]:
    """A function's code, with its decorators and without docstring, comments and line breaks, and the names in it."""
    source = textwrap.dedent(inspect.getsource(function))
    tree = ast.parse(source)
    first = tree.body[0].body[0]
    documented = ast.get_docstring(tree.body[0], clean=False) is not None
    skipped = range(first.lineno, first.end_lineno + 1) if documented else ()
    # Tokens and not ast.unparse, whose spelling differs between versions of Python.
    tokens = [
        token.string.strip() or tokenize.tok_name[token.type]
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in (tokenize.COMMENT, tokenize.NL) and token.start[0] not in skipped
    ]
    names = sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)})
    return " ".join(tokens), tuple(names)


def write(stem: Path, jobs: int) -> int:
    """Compile everything and write `stem`.jsonl and `stem`.md; returns the number of lines."""
    tasks = [
        (arch, dtype, i)
        for arch in ARCHS
        for dtype in DTYPES
        for i in range(len(list(specializations(ARCHS[arch], DTYPES[dtype]))))
    ]
    # Spawned: a child forked from a process with threads may hang.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        lines = list(pool.map(_compiled_line, tasks, chunksize=8))
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    stem.with_suffix(".md").write_text(markdown(lines))
    return len(lines)


def _compiled_line(task: tuple[str, str, int]) -> Line:
    arch, dtype = ARCHS[task[0]], task[1]
    spec = list(specializations(arch, DTYPES[dtype]))[task[2]]
    return line(spec, arch, dtype, compile_for(spec, arch), triton.__version__)


def read(stem: Path) -> list[Line]:
    """The lines of a table."""
    return [json.loads(text) for text in stem.with_suffix(".jsonl").read_text().splitlines()]


def differences(lines: list[Line]) -> list[str]:
    """Where a table is not what the kernels would give now, in words: without compiling, so registers are believed."""
    recorded = {(entry["arch"], entry["dtype"], entry["name"]): entry for entry in lines}
    wrong = [f"{' '.join(key)}: twice" for key in recorded if sum(_key(entry) == key for entry in lines) > 1]
    for arch_name, arch in ARCHS.items():
        for dtype, torch_dtype in DTYPES.items():
            for spec in specializations(arch, torch_dtype):
                entry = recorded.pop((arch_name, dtype, spec.name), None)
                if entry is None:
                    wrong.append(f"{arch_name} {dtype} {spec.name}: not in the table")
                    continue
                report = Report(spec.name, arch_name, *(entry[name] for name in FIGURES))
                now = json.loads(json.dumps(line(spec, arch, dtype, report, entry["triton"])))
                changed = [name for name in now if now[name] != entry.get(name)]
                if changed or now.keys() != entry.keys():
                    wrong.append(f"{arch_name} {dtype} {spec.name}: {', '.join(changed)} changed")
    return wrong + [f"{' '.join(key)}: no longer a kernel's" for key in recorded]


def _key(entry: Line) -> tuple[str, str, str]:
    return entry["arch"], entry["dtype"], entry["name"]


INTRODUCTION = """\
# Kernels, compiled ahead of time

Made without a GPU by `{command}`, with triton {triton}. Registers, spills, memory and instructions are the compiler's.
Occupancy follows from them by each architecture's limits. **The times are predictions at the roof and no
measurement**: the launch's bytes, matmul FLOPs, fp32 operations and special functions over the peak rates of a
datasheet, whichever takes longest (*roof*), and the same with the last wave of programs rounded up to a whole one
(*predicted*); `kernels/roofline.py` says what is counted and where the rates come from.

Columns: *spill*: bytes of stack a thread. *shared*, *tensor*: KiB of shared memory and columns of tensor memory a
program. *matrix*: instructions in the code, not executions. *global accesses*: instructions that move at least 16 bytes
a thread, of all: loads, stores, asynchronous copies; then bulk copies. *held*: programs on a processor at once, the
share of its warps they fill, and what allows no more.
"""


def markdown(lines: list[Line]) -> str:
    """The table for readers."""
    parts = [INTRODUCTION.format(command=COMMAND, triton=lines[0]["triton"])]
    for arch, board in BOARDS.items():
        here = [entry for entry in lines if entry["arch"] == arch]
        parts.append(
            f"## {arch}, {board.name}\n\n{board.processors} processors, {board.matrix_rate / 1e12:g} TFLOP/s in 16-bit"
            f" matrix units, {board.fp32_rate / 1e12:g} TFLOP/s in fp32, {board.special_rate / 1e12:.2g} T/s special"
            f" functions, {board.bandwidth / 1e12:g} TB/s.\n"
        )
        head = ("kernel", "dtype", "tile", "warps", "stages", "registers", "spill", "shared", "tensor", "matrix")
        parts.append(_table((*head, "global accesses", "held"), map(_compiled_cells, here)))
        head = ("kernel", "dtype", "N", "D", "V", "programs", "waves", "GFLOP", "MB", "bound by", "roof us")
        cells = (_launch_cells(entry, launch) for entry in here for launch in entry["launches"])
        parts.append(_table((*head, "predicted us"), cells))
    return "\n".join(parts)


def _compiled_cells(entry: Line) -> Iterator[str]:
    config, memory = entry["config"], entry["memory"]
    yield from (entry["name"], entry["dtype"])
    tile = {name.removeprefix("BLOCK_"): size for name, size in config.items() if name.startswith(("BLOCK_", "TILE_"))}
    yield " ".join(f"{name}{size}" for name, size in tile.items())
    yield from map(str, (config["num_warps"], config["num_stages"], entry["registers"], entry["stack"]))
    yield f"{entry['shared'] / 1024:.3g}"
    yield str(entry["tensor_memory"])
    matrix = [f"{count} {name.replace('.sync.aligned', '')}" for name, count in entry["matrix"].items()]
    yield "; ".join(matrix) or "none"
    kinds = [(memory[f"{kind}_16"], memory[f"{kind}_narrow"]) for kind in ("load", "store", "async")]
    yield ", ".join(f"{wide}/{wide + narrow}" for wide, narrow in kinds) + f"; {memory['bulk']}"
    yield f"{entry['blocks_per_processor']}, {entry['occupancy']:.0%}, {entry['occupancy_limit']}"


def _launch_cells(entry: Line, launch: Line) -> Iterator[str]:
    yield from (entry["name"], entry["dtype"])
    yield from (str(launch["sizes"].get(letter, "")) for letter in "NDV")
    yield from (str(launch["programs"]), f"{launch['waves']:.3g}")
    yield from (f"{launch['flops'] / 1e9:.4g}", f"{launch['bytes'] / 1e6:.4g}", launch["bound"])
    yield from (f"{launch['roof_us']:.4g}", f"{launch['predicted_us']:.4g}")


def _table(head, rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stem", type=Path, help="path of the files to write, without .jsonl and .md")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("interpreted kernels cannot be compiled: unset TRITON_INTERPRET")
    print(f"{write(args.stem, args.jobs)} lines in {args.stem.with_suffix('.jsonl')} and .md")


if __name__ == "__main__":
    main()
