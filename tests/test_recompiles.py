"""One compilation serves every number of rows, every length, and any place in memory: the keys of launches, no GPU.

Launches are recorded instead of run, in a process that does not interpret. The key that triton looks a compilation up
by is made by triton itself, from its own reading of the arguments.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROBE = """
import json, sys
import torch
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from prefkern.head import Head
from prefkern.kernels import fused_logits, links, lm_head, row_softmax, tail
from prefkern.kernels.tuning import ARCHS
from prefkern.layout import Layout

arch = ARCHS[sys.argv[1]]
keys = {}

def record(self, *args, grid, warmup, **kwargs):
    bind = create_function_from_signature(self.signature, self.params, make_backend(arch.target))
    _, specialization, options = bind(*args, debug=False, instrumentation_mode="", **kwargs)
    keys.setdefault(self.fn.__name__, set()).add(f"{specialization} {options}")

JITFunction.run = record
for module in (row_softmax, fused_logits, lm_head, tail):
    module.arch_of = lambda device: arch

def logits_path(N, V, offset, temperature):
    logits = torch.empty(N, V + 3, dtype=torch.bfloat16)[:, offset : offset + V]
    labels, weights = torch.zeros(N + 1, dtype=torch.int64)[1:], torch.ones(N + offset)[offset:]
    head = Head(temperature=temperature, ignore_index=-offset)
    stats = row_softmax.row_softmax_forward(logits, labels, head)
    row_softmax.row_softmax_backward(logits, labels, stats.lse, weights, head, out=logits)
    index = Layout.pairs([N // 2 - offset], [N - N // 2 + offset]).index(torch.device("cpu"))
    fused_logits.fused_logits_forward(
        logits, labels, head, index, links.logistic, (0.1, offset), token_weights_N=weights
    )
    tail.tail(stats.logps, index, links.logistic, (temperature,), token_weights_N=weights)

def cut_body(N, V, offset, temperature):
    hidden, weight = torch.zeros(N, 64, dtype=torch.bfloat16), torch.zeros(V, 64, dtype=torch.bfloat16)
    labels, lse = torch.zeros(N, dtype=torch.int64), torch.zeros(N)
    head = Head(temperature=temperature, ignore_index=-offset)
    lm_head.lm_head_forward(hidden, weight, labels, head)
    lm_head.lm_head_backward(
        hidden, weight, labels, lse, lse, head, needs_hidden=True, needs_weight=False, needs_bias=False,
        workspace_bytes=1 << 20,
    )

for path, *case in json.loads(sys.argv[2]):
    {"logits": logits_path, "cut": cut_body}[path](*case)
print(json.dumps({kernel: len(found) for kernel, found in keys.items()}))
"""


def compilations(arch: str, cases: list) -> dict[str, int]:
    """How many different compilations the launches of these cases look up, by kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROBE, arch, json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("arch", ["sm_90", pytest.param("gfx942", marks=pytest.mark.slow)])
def test_the_logits_path(arch):
    """Rows from few and split to many and whole, vocabularies, views from odd places, hyper-parameters."""
    cases = [
        ("logits", N, V, offset, 1.0 + offset / 3)
        for N, V in ((40, 32_000), (64, 32_003), (999, 40_001), (5000, 33_000))
        for offset in (0, 1, 3)
    ]
    found = compilations(arch, cases)
    kernels = (
        "row_softmax_forward_kernel",
        "row_softmax_backward_kernel",
        "fused_logits_forward_kernel",
        "tail_kernel",
    )
    assert found == dict.fromkeys(kernels, 1)


@pytest.mark.parametrize("arch", ["sm_90", pytest.param("gfx942", marks=pytest.mark.slow)])
def test_the_cut_body(arch):
    """From 65 rows on, and any number of slices of the vocabulary; fewer rows have a tile of their own."""
    found = compilations(arch, [("cut", N, V, N, N / 64) for N in (65, 999, 1024, 4100) for V in (4096, 8192)])
    kernels = ("lm_head_forward_kernel", "lm_head_combine_kernel", "lm_head_dlogits_kernel")
    assert found == dict.fromkeys(kernels, 1)


def test_the_probe_sees_a_recompilation():
    """Short rows share programs: another kernel."""
    found = compilations("sm_90", [("logits", 40, 32_000, 0, 1.0), ("logits", 40, 500, 0, 1.0)])
    assert found["row_softmax_forward_kernel"] == 2
