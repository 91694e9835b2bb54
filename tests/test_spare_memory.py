"""Memory of a gradient that is gone, for the next one: kept only where it is asked for again, never held twice."""

import ctypes
import mmap
import os
from pathlib import Path

import pytest
import torch

import prefkern as pk
from prefkern import spare_memory

resource = pytest.importorskip("resource")

pytestmark = pytest.mark.skipif(not spare_memory._CAN_KEEP, reason="left to malloc")

V, D = 131_072, 64  # 32 MiB in fp32


@pytest.fixture(autouse=True)
def spare(monkeypatch) -> list:
    """What is kept, at first nothing."""
    pages = []
    monkeypatch.setattr(spare_memory, "_spare", pages)
    return pages


def take(v: int = V, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return spare_memory.empty_like(torch.empty(1, dtype=dtype).expand(v, D))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_is_dense_and_like_what_was_asked_for(dtype, spare):
    x = take(dtype=dtype)
    assert x.shape == (V, D) and x.dtype == dtype and x.is_contiguous()
    x.fill_(3)
    assert (x == 3).all()


def test_what_is_asked_for_once_is_given_back(spare):
    take().fill_(1)
    (pages,) = spare
    assert pages[:4096] == bytes(4096) and pages[-4096:] == bytes(4096), "only the addresses are kept"


def test_what_is_asked_for_again_is_used_again(spare):
    addresses = set()
    for step in range(4):
        x = take()
        assert not spare
        addresses.add(x.data_ptr())
        x.fill_(step)
        del x
        assert len(spare) == 1
    assert len(addresses) == 1


def test_the_system_may_take_what_is_kept(spare):
    """MADV_FREE: of use only where the pages are private, and not done to those of a tensor that lives."""
    if "LazyFree:" not in Path("/proc/self/smaps").read_text():
        pytest.skip("the system does not say what it may take")
    for share in (0.0, 0.5, 0.5):  # after a first use nothing is there; later the system may have begun to take
        x = take().fill_(1)
        assert free_to_take(x.data_ptr()) == 0
        address = x.data_ptr()
        del x
        assert (free_to_take(address) > share * V * D * 4) == (share > 0)


def free_to_take(address: int) -> int:
    """Bytes of the mapping around an address that the system may take."""
    mapping = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *values = line.split()
        if "-" in key:
            begin, end = (int(x, 16) for x in key.split("-"))
            mapping = begin <= address < end
        elif mapping and key == "LazyFree:":
            return int(values[0]) * 1024
    return 0


def test_what_is_used_again_needs_no_fresh_pages(spare):
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        x = take()
        ctypes.memset(x.data_ptr(), 1, x.nbytes)  # by this thread
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

    pages = V * D * 4 // mmap.PAGESIZE
    if faults() < 0.5 * pages:
        pytest.skip("the system does not count faults, or has large pages only")
    faults()
    assert faults() < 0.1 * pages


def test_a_child_process_shares_nothing_that_is_kept(spare):
    take(), take()
    assert spare
    if (child := os.fork()) == 0:
        os._exit(len(spare))
    assert os.waitpid(child, 0)[1] == 0 and not spare


def test_without_memory_torch_says_so(spare, monkeypatch):
    def refuse(*args, **options):
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(spare_memory, "_Pages", refuse)
    assert take().shape == (V, D)
    with pytest.raises(RuntimeError, match="allocate"):
        take(1 << 50)


def test_a_view_holds_the_memory(spare):
    part = take()[5:7, 3]
    assert not spare
    del part
    assert spare


def test_two_at_once_are_apart_and_one_is_kept(spare):
    one = take().fill_(1)
    two = take().fill_(2)
    assert (one == 1).all() and (two == 2).all()
    del one, two
    assert len(spare) == 1


def test_another_size_replaces_what_is_kept(spare):
    take()
    take(2 * V)
    assert [len(pages) for pages in spare] == [2 * V * D * 4]


def test_little_memory_is_left_to_malloc(spare):
    take(V - 1)
    assert not spare


def test_gradients_of_a_loop_share_memory_and_are_right(spare):
    """Each step's gradient is the same, whatever the memory held; the parameter takes it without a copy."""
    torch.manual_seed(0)
    hidden, labels = torch.randn(6, D, requires_grad=True), torch.randint(0, V, (6,))
    weight = torch.nn.Parameter(torch.randn(V, D) / 8)
    first, addresses = None, set()
    for _ in range(4):
        pk.token_logps(hidden, weight, labels).logps.sum().backward()
        addresses.add(weight.grad.data_ptr())
        first = weight.grad.clone() if first is None else first
        assert torch.equal(weight.grad, first)
        weight.grad = None
    assert len(addresses) == 1 and len(spare) == 1


def test_gradients_that_add_up_need_one_spare(spare):
    torch.manual_seed(0)
    hidden, labels = torch.randn(6, D), torch.randint(0, V, (6,))
    weight = torch.nn.Parameter(torch.randn(V, D) / 8)
    for _ in range(3):
        pk.token_logps(hidden, weight, labels).logps.sum().backward()
    assert len(spare) == 1
    (one,) = torch.autograd.grad(pk.token_logps(hidden, weight, labels).logps.sum(), weight)
    torch.testing.assert_close(weight.grad, 3 * one)
