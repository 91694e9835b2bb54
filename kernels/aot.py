"""Ahead-of-time compilation of every kernel at its default configurations, for processors that are not here.

    python -m prefkern.kernels.aot --arch sm_90 --dtype bf16          a table; --json for machines

Each kernel module lists what it launches in `specializations(arch, dtype)`. What is read back: registers a thread,
stack or scratch bytes (spills), shared and tensor memory, and how often which instruction stands in the assembly. It
runs where kernels are not interpreted, that is, without TRITON_INTERPRET. The committed table: aot_table.py.
"""

import argparse
import importlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.compiler import ASTSource

from .tuning import ARCHS, TYPE_NAMES, Arch, Specialization

MODULES = ("row_softmax", "lm_head", "tail", "fused_logits")
DTYPES = {name: dtype for dtype, name in TYPE_NAMES.items()}

# The tensor-core instruction of each family, as it shows in PTX or AMD assembly.
MATRIX_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync", "v_mfma")
_MATRIX = re.compile(r"\b(?:" + "|".join(map(re.escape, MATRIX_INSTRUCTIONS)) + r")[\w.:]*")

# Accesses to global memory. PTX has the width of a load in its type and vector, of an asynchronous copy in an operand.
_PTX_ACCESS = re.compile(r"\b(ld|st)((?:\.\w+(?:::\w+)*)*\.global(?:\.\w+(?:::\w+)*)*)")
_PTX_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared[\w:]*\.global[^;]*?,\s*(0x[0-9a-f]+|\d+)\s*[,;]")
_PTX_BULK = re.compile(r"\bcp\.async\.bulk\.(?!commit|wait)")
_AMD_ACCESS = re.compile(r"\b(?:global|buffer|flat)_(load|store)_(\w+)")


@dataclass(frozen=True)
class Report:
    """What the compiler made of one specialisation.

    Fields:
        registers: a thread's.
        stack: bytes a thread outside registers: spills.
        shared, tensor_memory: bytes of shared memory and columns of tensor memory of a program.
        matrix: how often each matrix instruction stands in the assembly (not how often it runs).
        memory: the same for accesses to global memory: loads and stores of 16 bytes a thread or more and narrower
            ones, asynchronous copies likewise, and bulk copies.
    """

    name: str
    arch: str
    registers: int
    stack: int
    shared: int
    tensor_memory: int
    matrix: dict[str, int]
    memory: dict[str, int]

    @property
    def matrix_instruction(self) -> str | None:
        """The family of its matrix instructions."""
        return next((family for family in MATRIX_INSTRUCTIONS if any(family in name for name in self.matrix)), None)

    def fault(self, spec: Specialization, arch: Arch) -> str | None:
        """Why it must not be a default, or None."""
        if self.stack:
            return f"spills: {self.stack} bytes of stack"
        if self.shared > arch.shared_memory:
            return f"{self.shared} bytes of shared memory, {arch.name} has {arch.shared_memory}"
        if spec.tensor_cores and self.matrix_instruction is None:
            return "its matmul does not use the tensor cores"
        return None


def specializations(arch: Arch, dtype: torch.dtype) -> Iterator[Specialization]:
    """Those of every kernel module."""
    for name in MODULES:
        yield from importlib.import_module(f"{__package__}.{name}").specializations(arch, dtype)


def compile_for(spec: Specialization, arch: Arch) -> Report:
    """Compile one specialisation and read back what became of it.

    Raises:
        ValueError: an argument of the kernel has neither a type nor a value, or a name is not an argument.
    """
    arguments = spec.kernel.arg_names
    given = spec.signature.keys() | spec.constexprs.keys()
    if given != set(arguments):
        raise ValueError(f"{spec.name}: arguments {sorted(given ^ set(arguments))} are missing or unknown")
    signature = {name: spec.signature.get(name, "constexpr") for name in arguments}
    constants = {(arguments.index(name),): value for name, value in spec.constexprs.items()}
    anywhere = {p.name for p in spec.kernel.params if p.do_not_specialize_on_alignment}
    aligned = [n for n, t in spec.signature.items() if n in spec.divisible or t.startswith("*") and n not in anywhere]
    attrs = {(arguments.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(spec.kernel, signature, constants, attrs)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages} | spec.limits
    compiled = triton.compile(source, target=arch.target, options=options)
    registers, stack, assembly = (_read_amd if arch.target.backend == "hip" else _read_nvidia)(compiled)
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    matrix = dict(sorted(Counter(_MATRIX.findall(assembly)).items()))
    shared = compiled.metadata.shared
    return Report(spec.name, arch.name, registers, stack, shared, tensor_memory, matrix, memory_accesses(assembly))


def memory_accesses(assembly: str) -> dict[str, int]:
    """How often each kind of access to global memory stands in PTX or AMD assembly."""
    found = Counter({f"{kind}_{width}": 0 for kind in ("load", "store", "async") for width in ("16", "narrow")})
    for kind, suffix in _PTX_ACCESS.findall(assembly):
        vector, bits = re.search(r"\.v(\d+)", suffix), re.search(r"[busf](\d+)$", suffix)
        wide = int(bits[1]) * int(vector[1] if vector else 1) >= 128
        found[("load_" if kind == "ld" else "store_") + ("16" if wide else "narrow")] += 1
    for size in _PTX_COPY.findall(assembly):
        found["async_16" if int(size, 0) == 16 else "async_narrow"] += 1
    for kind, width in _AMD_ACCESS.findall(assembly):
        found[f"{kind}_16" if width.startswith("dwordx4") else f"{kind}_narrow"] += 1
    return dict(found) | {"bulk": len(_PTX_BULK.findall(assembly))}


def _read_nvidia(compiled) -> tuple[int, int, str]:
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
    return registers, stack, compiled.asm["ptx"]


def _read_amd(compiled) -> tuple[int, int, str]:
    assembly = compiled.asm["amdgcn"]
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])
    scratch = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)[1])
    return registers, scratch, assembly


def reports(arch: Arch, dtype: torch.dtype, only: str = "") -> Iterator[tuple[Report, str | None]]:
    """Report and fault of every specialisation whose name contains `only`."""
    for spec in specializations(arch, dtype):
        if only in spec.name:
            report = compile_for(spec, arch)
            yield report, report.fault(spec, arch)


def main() -> None:
    """Print a table, or JSON, of every specialisation; exit status 1 if one is at fault."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", choices=ARCHS, action="append", help="default: all")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: all")
    parser.add_argument("--only", default="", help="part of a kernel's name")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    faults = 0
    for arch_name in args.arch or ARCHS:
        for dtype_name in args.dtype or DTYPES:
            for report, fault in reports(ARCHS[arch_name], DTYPES[dtype_name], args.only):
                faults += fault is not None
                if args.json:
                    print(json.dumps(asdict(report) | {"dtype": dtype_name, "fault": fault}), flush=True)
                    continue
                row = f"{arch_name:7} {dtype_name:5} {report.name:34} {report.registers:4} registers"
                row += f" {report.stack:5} stack {report.shared:7} shared"
                print(f"{row}  {report.matrix_instruction or '':16} {fault or ''}".rstrip(), flush=True)
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
