"""Every kernel compiles for every processor we name, in every dtype, with no spills: no GPU needed.

Interpreted functions cannot be compiled, so each compilation runs in a fresh process that does not interpret.
"""

import ast
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("triton")
import triton

from prefkern.kernels import aot_table, links
from prefkern.kernels.aot import DTYPES
from prefkern.kernels.tuning import ARCHS

# One of either vendor in one dtype keeps the default run short; CI compiles all.
DEFAULT = {("sm_90", "bf16"), ("gfx942", "bf16")}
CASES = [
    pytest.param(*case, marks=[] if case in DEFAULT else pytest.mark.slow, id="-".join(case))
    for case in product(ARCHS, DTYPES)
]
# Kernels whose matmul has to use the newest matrix instruction of these.
NEWEST = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma", "sm_80": "mma.sync"}
TABLE = Path(__file__).parent.parent / "bench" / "results" / "aot"


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Run this interpreter on some arguments in an environment that compiles; returns its standard output."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))

    def run(*args: str) -> str:
        done = subprocess.run([sys.executable, *args], env=environment, capture_output=True, text=True)
        assert done.returncode in (0, 1) and not done.stderr, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def compiled(python, request):
    """Compilations of the selected cases, under way side by side."""
    users = ("test_defaults[", "test_the_table_holds_what_the_compiler_makes[")
    params = [item.callspec.params for item in request.session.items if item.name.startswith(users)]
    selected = {(p["arch"], p["dtype"]) for p in params}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        arguments = ("-m", "prefkern.kernels.aot", "--json")
        yield {
            (arch, dtype): pool.submit(python, *arguments, "--arch", arch, "--dtype", dtype) for arch, dtype in selected
        }


@pytest.mark.parametrize("arch, dtype", CASES)
def test_defaults(arch, dtype, compiled):
    reports = [json.loads(line) for line in compiled[arch, dtype].result().splitlines()]
    names = [report["name"] for report in reports]
    for kernel in ("row_softmax_forward", "row_softmax_backward", "lm_head_forward", "lm_head_dlogits"):
        assert {f"{kernel} plain", f"{kernel} full"} <= set(names)
    assert {"lm_head_combine", "fused_logits pairs plain", "fused_logits lists prefix full"} <= set(names)
    tails = {"tail pairs short", "tail lists prefix", *(f"tail link {link.__name__}" for link, _ in links.LINKS)}
    assert {name for name in names if name.startswith("tail ")} >= (tails if dtype == "fp32" else set())
    assert {report["name"]: report["fault"] for report in reports if report["fault"]} == {}
    if dtype != "fp32":
        matmuls = [r for r in reports if r["name"].startswith(("lm_head_forward", "lm_head_dlogits"))]
        assert {name[: len(NEWEST[arch])] for r in matmuls for name in r["matrix"] or ["none"]} == {NEWEST[arch]}
        has_copy_engine = arch in ("sm_90", "sm_100")
        assert all((r["memory"]["bulk"] > 0) == (has_copy_engine and "pointers" not in r["name"]) for r in matmuls)


@pytest.mark.parametrize("arch, dtype", CASES)
def test_the_table_holds_what_the_compiler_makes(arch, dtype, compiled):
    lines = aot_table.read(TABLE)
    if lines[0]["triton"] != triton.__version__:
        pytest.skip(f"the table was made with triton {lines[0]['triton']}")
    recorded = [entry for entry in lines if (entry["arch"], entry["dtype"]) == (arch, dtype)]
    reports = [json.loads(line) for line in compiled[arch, dtype].result().splitlines()]
    figures = [{name: entry[name] for name in ("name", *aot_table.FIGURES)} for entry in recorded]
    assert figures == [{name: r[name] for name in ("name", *aot_table.FIGURES)} for r in reports], (
        f"`{aot_table.COMMAND}` makes the table again"
    )


def test_every_link_is_listed():
    listed = [link.__name__ for link, _ in links.LINKS]
    written = [
        node.name
        for file in links._FILES
        for node in ast.parse(Path(file.__file__).read_text()).body
        if isinstance(node, ast.FunctionDef) and [a.arg for a in node.args.args][:2] == ["score_K", "valid_K"]
    ]
    assert written and sorted(listed) == sorted(written)


PROBE = """
import sys
from dataclasses import replace
import torch
from prefkern.kernels.aot import ARCHS, compile_for
from prefkern.kernels.lm_head import specializations
arch, tile, options = ARCHS[sys.argv[1]], eval(sys.argv[2]), eval(sys.argv[3])
spec = next(s for s in specializations(arch, torch.bfloat16) if s.name == "lm_head_forward plain")
spec = replace(spec, constexprs=spec.constexprs | tile, **options)
print(compile_for(spec, arch).fault(spec, arch))
"""


@pytest.mark.parametrize(
    "arch, tile, options, fault",
    [
        ("sm_90", dict(BLOCK_N=128, BLOCK_V=256), dict(num_warps=4), "spills: "),
        pytest.param("gfx942", dict(BLOCK_N=128, BLOCK_V=512), dict(), "spills: ", marks=pytest.mark.slow),
        ("sm_80", dict(BLOCK_D=128), dict(num_stages=4), "bytes of shared memory, sm_80 has 166912"),
        ("sm_80", dict(), dict(), "None"),
    ],
    ids=["spills", "spills on AMD", "shared memory", "none"],
)
def test_a_configuration_that_is_too_large_is_reported(arch, tile, options, fault, python):
    assert fault in python("-c", PROBE, arch, repr(tile), repr(options))


MISSING = """
from dataclasses import replace
import torch
from prefkern.kernels.aot import ARCHS, compile_for
from prefkern.kernels.row_softmax import specializations
spec = specializations(ARCHS["sm_90"], torch.bfloat16)[0]
try:
    compile_for(replace(spec, constexprs=spec.constexprs | {"BLOCK": 1}), ARCHS["sm_90"])
except ValueError as error:
    print(error)
"""


def test_a_signature_that_does_not_fit_the_kernel_is_named(python):
    assert "arguments ['BLOCK'] are missing or unknown" in python("-c", MISSING)
