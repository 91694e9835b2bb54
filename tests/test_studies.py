"""The studies run, say what their tables say, and are committed with the columns that they write."""

import importlib
import math

import pytest
import torch

import prefkern as pk
from bench.studies import STUDIES, common, language

MODULES = {name: importlib.import_module(f"bench.studies.{name}") for name in STUDIES}
README = (common.RESULTS.parent / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """Where the start model is kept; not in the checkout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "SCRATCH", tmp_path_factory.mktemp("scratch"))
        yield


@pytest.fixture(scope="module")
def one_thread():
    """A study sets the number of threads for its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name == "anchored" else pytest.mark.slow) for name in STUDIES
])  # fmt: skip
def test_a_quick_run_writes_table_picture_and_text_twice_the_same(name, scratch, one_thread, tmp_path):
    study = MODULES[name]
    text = common.run(study, tmp_path / "one", quick=True)
    table = text.with_suffix(".csv")
    assert text.with_suffix(".png").stat().st_size > 10_000
    judged = study.claims(common.read_csv(table))
    assert all(claim.statement in text.read_text() and claim.evidence in text.read_text() for claim in judged)
    again = common.run(study, tmp_path / "two", quick=True).with_suffix(".csv")
    assert again.read_bytes() == table.read_bytes()
    committed = common.RESULTS / f"{name}.csv"
    assert committed.read_text().splitlines()[0] == table.read_text().splitlines()[0]


@pytest.mark.parametrize("name", STUDIES)
def test_committed_text_is_what_the_committed_table_says(name, tmp_path):
    table = tmp_path / f"{name}.csv"
    table.write_bytes((common.RESULTS / f"{name}.csv").read_bytes())
    committed = (common.RESULTS / f"{name}.md").read_text(encoding="utf-8")
    assert common.report(MODULES[name], table).read_text(encoding="utf-8") == committed
    assert (common.RESULTS / f"{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", STUDIES)
def test_readme_tells_the_command(name):
    assert f"`python -m bench.studies.{name}`" in README


def test_mean_has_the_interval_of_students_t():
    found = common.mean([1.0, 2.0, 3.0, 6.0])
    assert found.value == 3.0
    assert found.half == pytest.approx(3.182 * math.sqrt(14 / 3) / 2, rel=1e-6)
    assert (found.above(-1.0), found.above(), found.above(7.0)) == (True, None, False)


def test_a_table_reads_as_it_was_written(tmp_path):
    rows = [{"name": "a", "count": 3, "share": 0.25, "note": ""}, {"name": "b", "count": 4, "share": 1e-9, "note": "x"}]
    assert common.read_csv(common.write_csv(tmp_path / "t.csv", rows)) == rows


@pytest.fixture(scope="module")
def batch(scratch):
    task = language.make_task(language.QUICK.sizes)
    packed = task.pack(task.pairs[:6])
    with torch.no_grad():
        return packed, packed.logps(task.reference)


def test_leaky_alphadpo_has_the_value_of_alphadpo_and_another_gradient(batch):
    study, (packed, ref) = MODULES["alphadpo"], batch
    logps = (ref + 0.1 * torch.randn(ref.shape, generator=common.generator("leaky"))).requires_grad_()
    loss = pk.losses.get("alphadpo", beta=study.BETA, gamma=study.GAMMA_RATIO, alpha=0.1, eps=study.EPS)
    leaky, ours = study.LeakyAlphaDPO(0.1), loss.new_state()
    for _ in range(2):  # the second call sees running statistics
        value = leaky(packed, logps, ref)
        out = pk.preference_loss(logps, packed.layout, loss, ref_logps=ref, state=ours)
        assert value.item() == pytest.approx(out.loss.item(), rel=1e-5)
    [one], [other] = torch.autograd.grad(value, logps), torch.autograd.grad(out.loss, logps)
    assert (one - other).abs().max() > 0.1 * other.abs().max()


def test_balance_is_that_of_closed_forms(batch):
    """DPO: gradients are equal in log-probability; in P/R they are as R_w/P_w to R_l/P_l."""
    packed, ref = batch
    shift = 0.05 * torch.randn(ref.shape, generator=common.generator("balance"))

    class Shifted:
        training = False

        def eval(self): ...
        def train(self, mode): ...

    moved = language.Packed({**packed.fields})
    object.__setattr__(moved, "logps", lambda model: ref + shift)
    found = MODULES["adadpo"].balance(Shifted(), moved, ref, pk.losses.get("dpo", beta=1.0))
    a = packed.response_sums(shift)
    assert found["log_prob_size"] == pytest.approx(0, abs=1e-5)
    assert found["relative_signed"] == pytest.approx((a[1::2] - a[0::2]).mean().item(), rel=1e-4)
