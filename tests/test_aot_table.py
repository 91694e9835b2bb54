"""The committed table of ahead-of-time compilations is that of the kernels as they are."""

import copy
import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("triton")
from prefkern.kernels import aot, aot_table
from prefkern.kernels.tuning import ARCHS, Specialization

STEM = Path(__file__).parent.parent / "bench" / "results" / "aot"


@pytest.fixture(scope="module")
def committed():
    return aot_table.read(STEM)


def test_the_table_is_current(committed):
    found = aot_table.differences(committed)
    some = "\n".join(found[:10])
    assert not found, f"{STEM}.jsonl is out of date in {len(found)} lines: run `{aot_table.COMMAND}`\n{some}"
    same = STEM.with_suffix(".md").read_text() == aot_table.markdown(committed)
    assert same, f"{STEM}.md does not go with {STEM}.jsonl: run `{aot_table.COMMAND}`"


def test_no_kernel_in_the_table_is_at_fault(committed):
    faults = [
        (entry["arch"], entry["dtype"], entry["name"])
        for entry in committed
        if entry["stack"] or entry["shared"] > ARCHS[entry["arch"]].shared_memory or not entry["blocks_per_processor"]
    ]
    assert faults == []
    assert len({entry["triton"] for entry in committed}) == 1


@pytest.fixture(scope="module")
def invented():
    """A table of the kernels as they are, with a compiler's figures that are made up."""
    reports = aot.Report("", "", registers=32, stack=0, shared=0, tensor_memory=0, matrix={}, memory={})
    return [
        aot_table.line(spec, arch, dtype, reports, "0")
        for arch in ARCHS.values()
        for dtype, torch_dtype in aot.DTYPES.items()
        for spec in aot.specializations(arch, torch_dtype)
    ]


def test_a_current_table_is_taken_as_such(invented):
    assert aot_table.differences(invented) == []


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda lines: lines.pop(0), "not in the table"),
        (lambda lines: lines.append(lines[0]), "twice"),
        (lambda lines: lines.append(lines[0] | {"name": "gone"}), "sm_80 bf16 gone: no longer a kernel's"),
        (lambda lines: lines[0].update(fingerprint="0"), "fingerprint changed"),
        (lambda lines: lines[0]["config"].update(num_warps=32), "config changed"),
        # What follows from the registers must follow from those in the table.
        (lambda lines: lines[0].update(registers=255), "blocks_per_processor, occupancy, occupancy_limit"),
        (lambda lines: lines[0]["launches"][0].update(bytes=1), "launches changed"),
    ],
    ids=["missing", "twice", "gone", "code", "configuration", "occupancy", "work"],
)
def test_a_stale_table_is_noticed(invented, change, message):
    lines = copy.deepcopy(invented)
    change(lines)
    found = aot_table.differences(lines)
    assert len(found) == 1 and message in found[0]


KERNEL = '''
import triton
import triton.language as tl

LOG_ZERO = tl.constexpr(-1e4)
POINTERS = ["x_ptr"]


@triton.jit
def double(x):
    """Twice as much."""
    return 2 * x


@triton.jit
def triple(x):
    return 3 * x


@triton.jit(do_not_specialize_on_alignment=POINTERS)
def kernel(x_ptr, LINK: tl.constexpr):
    """One program an element."""
    x_ptr += tl.program_id(0)  # its own
    tl.store(x_ptr, LINK(double(tl.load(x_ptr))) + LOG_ZERO)
'''


def fingerprint_of(path: Path, old: str = "", new: str = "", link: str = "triple", **options) -> str:
    """Of a specialisation of KERNEL, with a piece of its text replaced."""
    assert old in KERNEL
    file = path / f"{len(list(path.iterdir()))}.py"
    file.write_text(KERNEL.replace(old, new))
    module_spec = importlib.util.spec_from_file_location("sample", file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    options = dict(num_warps=4, num_stages=1) | options
    spec = Specialization("sample", module.kernel, {"x_ptr": "*fp32"}, {"LINK": getattr(module, link)}, **options)
    return aot_table.fingerprint(spec)


def test_the_fingerprint_is_of_the_code_and_not_of_its_comments(tmp_path):
    before = fingerprint_of(tmp_path)
    for old, new in (("  # its own", ""), ("One program", "A program"), ("Twice as much.", "2x"), ("\n\n\n", "\n\n")):
        assert fingerprint_of(tmp_path, old, new) == before, old
    for old, new in (
        ("program_id(0)", "program_id(1)"), ("2 * x", "x + x"), ("3 * x", "4 * x"), ("-1e4", "-1e5"),
        ('["x_ptr"]', "[]"),
    ):  # fmt: skip
        assert fingerprint_of(tmp_path, old, new) != before, old
    assert fingerprint_of(tmp_path, link="double") != before
    assert fingerprint_of(tmp_path, num_warps=8) != before
    assert fingerprint_of(tmp_path, limits={"maxnreg": 128}) != before
    assert fingerprint_of(tmp_path, divisible=("N",)) != before


PTX = """
    @%p3 ld.global.v4.b32 { %r21, %r22, %r23, %r24 }, [ %rd10 + 0 ];
    ld.global.L1::evict_last.v2.b64 { %rd1, %rd2 }, [ %rd11 + 0 ];
    ld.volatile.global.b32 { %r25 }, [ %rd12 + 0 ];
    ld.global.v4.b16 { %rs1, %rs2, %rs3, %rs4 }, [ %rd12 + 0 ];
    ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %r5 ];
    @%p1 st.global.v4.b32 [ %rd13 + 0 ], { %r1, %r2, %r3, %r4 };
    @%p1 st.global.b16 [ %rd13 + 0 ], { %rs1 };
    cp.async.cg.shared.global [ %r152 + 0 ], [ %rd77 + 0 ], 0x10, %r153;
    cp.async.ca.shared.global [ %r152 + 0 ], [ %rd77 + 0 ], 0x4, %r153;
    cp.async.commit_group;
    cp.async.wait_group 0x1;
    cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2, %r3}], [%r4];
    cp.async.bulk.commit_group;
"""
AMD = """
    global_load_dwordx4 v[4:7], v[2:3], off
    global_load_ushort v8, v[2:3], off
    buffer_load_dwordx4 v[4:7], v2, s[0:3], 0 offen
    ds_read_b128 v[0:3], v4
    global_store_dwordx2 v[2:3], v[4:5], off
"""


@pytest.mark.parametrize(
    "assembly, expected",
    [
        (PTX, dict(load_16=2, load_narrow=2, store_16=1, store_narrow=1, async_16=1, async_narrow=1, bulk=1)),
        (AMD, dict(load_16=2, load_narrow=1, store_16=0, store_narrow=1, async_16=0, async_narrow=0, bulk=0)),
    ],
    ids=["ptx", "amdgcn"],
)
def test_accesses_are_counted_by_width(assembly, expected):
    assert aot.memory_accesses(assembly) == expected
