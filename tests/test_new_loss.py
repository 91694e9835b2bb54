"""A loss is its own file: two that are registered here work everywhere, and nothing else knows of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("triton")
import triton
import triton.language as tl

import prefkern as pk
import tiny
from conftest import DEVICE
from prefkern import checks, losses
from prefkern.losses import base, groups
from prefkern.training import registry_docs
from prefkern.training.cli import main
from prefkern.training.fields import describe_loss
from prefkern.training.resolve import resolve_loss


@triton.jit
def squared_shortfall(score_K, valid_K, target_K, margin, p0, p1, p2, p3, p4, p5):
    """K = 2: value = max(0, p1 - p0 (score_0 - score_1))^2."""
    sign_K = tl.where(tl.arange(0, score_K.shape[0]) == 0, 1.0, -1.0)
    short = tl.maximum(p1 - p0 * tl.sum(sign_K * score_K, axis=0), 0.0)
    return short * short, -2.0 * p0 * short * sign_K


@dataclass(frozen=True, kw_only=True)
class SquaredHinge(losses.PairLoss):
    """Pairs whose reward margin falls short of a gap pay the square of what they lack.

        L = max(0, gap - beta * (a_w - a_l))^2,    mean over pairs

    Fields:
        beta: strength of the pull to the reference, in 1/nats.
        gap: the margin from which a pair costs nothing.
    Source:
        This test.
    """

    link: ClassVar[triton.JITFunction] = squared_shortfall
    needs_reference: ClassVar[bool] = True
    formula: ClassVar[str] = "max(0, gap - beta (a_w - a_l))^2"
    source: ClassVar[str] = "this test"
    confidence: ClassVar[str] = "derived"

    beta: float = base.ranged(0.1, 0, 100, "0.1 here", open_low=True)
    gap: float = base.ranged(1.0, 0, 10, "1 here")

    def eager(self, score_GK: Tensor, margin: Tensor | float = 0.0) -> Tensor:
        return (self.gap - self.beta * (score_GK[:, 0] - score_GK[:, 1])).clamp(min=0) ** 2

    def link_params(self) -> tuple[float, ...]:
        return self.beta, self.gap


@dataclass(frozen=True, kw_only=True)
class PickBest(losses.Loss):
    """The response with the best score shall be the likeliest of its list.

        L = -log softmax(beta * a)[best],    mean over prompts

    Fields:
        beta: as in `dpo`.
    Source:
        This test.
    """

    link: ClassVar[str] = "cross_entropy"
    arity: ClassVar[Literal["pair", "single", "list"]] = "list"
    needs_reference: ClassVar[bool] = True
    target_kind: ClassVar[Literal["score", "label", "preference"] | None] = "score"
    link_targets: ClassVar[bool] = True
    formula: ClassVar[str] = "-log softmax(beta a)[best]"
    source: ClassVar[str] = "this test"
    confidence: ClassVar[str] = "derived"

    beta: float = base.ranged(0.1, 0, 100, "0.1 here", open_low=True)

    def scale(self, batch: losses.base.Batch) -> Tensor:
        return torch.full_like(batch.count_R, self.beta)

    def target(self, batch: losses.base.Batch) -> Tensor:
        score_GK, valid_GK = groups.pad(batch.target_R, batch.index)
        best_G = score_GK.masked_fill(~valid_GK, -torch.inf).argmax(1)
        return groups.unpad(torch.nn.functional.one_hot(best_G, score_GK.shape[1]).to(score_GK), batch.index)

    def eager(self, score_GK, margin=0.0, target_GK=None, valid_GK=None) -> Tensor:
        log_p_GK = score_GK.masked_fill(~valid_GK, -torch.inf).log_softmax(1)
        return -(target_GK * log_p_GK.masked_fill(~valid_GK, 0.0)).sum(1)

    def link_params(self) -> tuple[float, ...]:
        return ()

    def metrics(self, score_R: Tensor, logp_R: Tensor, batch: losses.base.Batch) -> dict[str, Tensor]:
        return {"rewards/mean": score_R.mean()}


NEW = {"squared_hinge": SquaredHinge, "pick_best": PickBest}


@pytest.fixture(scope="module", autouse=True)
def registered():
    """The two losses in a copy of the registry, which goes when this file is done."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
        for name, cls in NEW.items():
            losses.register(name)(cls)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("new_loss")
    tiny.write_run(folder)
    return folder


@pytest.mark.parametrize("check", checks.ALL, ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", NEW)
def test_common_checks(name, check):
    for loss in checks.instances(name):
        check(loss)


@pytest.mark.parametrize("name", NEW)
def test_link_matches_eager(name):
    for loss in checks.instances(name):
        checks.link_matches_eager(loss, DEVICE)


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_values_by_hand(impl):
    logps = torch.tensor([-1.0, -2.0, -4.0], device=DEVICE)
    ref = torch.zeros(3, device=DEVICE)
    pair, lists = losses.get("squared_hinge", beta=0.5, gap=3.0), losses.get("pick_best", beta=0.5)
    out = pk.preference_loss(logps[:2], pk.Layout.pairs([1], [1]), pair, ref_logps=ref[:2], impl=impl)
    assert out.loss.item() == pytest.approx((3 - 0.5 * (-1 + 2)) ** 2)
    assert out.metrics["rewards/margins"].item() == pytest.approx(0.5)
    scores = torch.tensor([0.0, 7.0, -1.0], device=DEVICE)
    out = pk.preference_loss(
        logps, pk.Layout.groups([1, 1, 1], [3]), lists, ref_logps=ref, targets=scores, impl=impl
    )  # fmt: skip
    assert out.loss.item() == pytest.approx(-(0.5 * logps).log_softmax(0)[1].item())


@pytest.mark.parametrize("name", NEW)
def test_the_command_line_and_the_pages_show_it(name, capsys):
    cls = NEW[name]
    assert main(["losses"]) == 0
    [row] = [line for line in capsys.readouterr().out.splitlines() if line.split()[0] == name]
    assert cls.arity in row and "reference" in row and row.endswith(cls.formula)
    assert main(["losses", name]) == 0
    page = capsys.readouterr().out
    assert page.startswith(f"{name}\n{'=' * len(name)}\n\n{cls.__doc__.splitlines()[0]}\n")
    text = registry_docs.markdown()
    assert f"\n| [`{name}`](#{name}) | `{cls.formula}` | {cls.arity} | " in text and f"\n## {name}\n" in text
    for column in tiny.rows_for(losses.get(name), 1)[0]:
        assert column in page
    for option in registry_docs.options(cls):
        assert f"\n{name}.{option.name}: {option.default}\n" in page and option.meaning


@pytest.mark.parametrize("loss", [
    {"name": "squared_hinge", "gap": 2.0, "nll_weight": 0.5},
    {"name": "pick_best", "beta": 0.5},
    {"name": "combination", "parts": [{"weight": 1, "name": "squared_hinge"}, {"weight": 0.5, "name": "dpo"}]},
    {"name": "adadpo", "base": {"name": "squared_hinge", "gap": 2.0}},
], ids=lambda loss: loss["name"])  # fmt: skip
def test_it_trains(folder, tmp_path, loss):
    history = tiny.train(folder, loss, tmp_path / "out")
    assert len(history) == 2 and all(line["grad_norm"] > 0 for line in history)
    before, after = (load_file(f / "model.safetensors") for f in (folder / "model", tmp_path / "out" / "model"))
    assert any(not torch.equal(before[k], after[k]) for k in before)
    saved = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["loss"]
    assert resolve_loss(saved) == resolve_loss(loss)


@pytest.mark.parametrize("name", NEW)
def test_it_is_written_and_read_back(name):
    for loss in [*checks.instances(name), losses.get(name, beta=0.3)]:
        section = yaml.safe_load(yaml.safe_dump(describe_loss(loss)))
        assert resolve_loss(section) == loss
        assert section.keys() == {"name", *losses.options(name)}


@pytest.mark.parametrize("words, message", [
    (["loss.name=squared_hing"], "unknown loss.name='squared_hing': did you mean 'squared_hinge'?"),
    (["loss.gapp=1"], "unknown key 'loss.gapp': did you mean 'gap'?"),
    (["loss.gap=wide"], "loss.gap='wide' should be a number, not text"),
    (["loss.gap=-1"], "the loss section is wrong: squared_hinge: gap=-1 must be a number in [0, 10] (1 here)"),
    (["reference.mode=none"], "loss 'squared_hinge' compares with a reference: set reference.mode to frozen or"),
    (["loss.name=pick_best"], "data.train has no column 'completions' and no column 'scores'"),
], ids=lambda value: value[0] if isinstance(value, list) else "")  # fmt: skip
def test_wrong_options_are_one_sentence(folder, tmp_path, capsys, words, message):
    config = {
        "run": {"output": str(tmp_path / "out")}, "model": {"name": str(folder / "model")},
        "data": {"train": str(folder / "data.jsonl")}, "loss": {"name": "squared_hinge"}, "trainer": {"use_cpu": True},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(tmp_path / "config.yaml"), *words]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prefkern: ")]
    assert len(told) == 1 and message in told[0]
    assert not (tmp_path / "out").exists()
