"""Without a GPU every Triton kernel runs in the interpreter; with one, the same tests run the real kernels."""

import importlib.util
import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by triton when a kernel is decorated
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # unset, its meaning differs between triton 3.9 and 3.10
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Where triton does not exist (macOS), a test that asks for a Triton body is skipped and not failed."""
    try:
        return (yield)
    except RuntimeError as error:
        if importlib.util.find_spec("triton") is None and "the triton package is not installed" in str(error):
            pytest.skip(str(error))
        raise


def pytest_generate_tests(metafunc):
    """`engine`: what multiplies bf16 on this processor, in turn."""
    if "engine" in metafunc.fixturenames:
        library = product_cpu_library()
        names = {1: "vectors", 2: "tiles"}
        # The last one asked for, which is the default, stays.
        there = [i for i in names if library is not None and library.prefkern_multiply_by(i) == i]
        metafunc.parametrize("engine", there, ids=[names[i] for i in there], indirect=True, scope="function")


@pytest.fixture
def engine(request):
    assert product_cpu_library().prefkern_multiply_by(request.param) == request.param
    yield request.param
    product_cpu_library().prefkern_multiply_by(2)


def product_cpu_library():
    from prefkern.kernels import product_cpu

    return product_cpu.library()
