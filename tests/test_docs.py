"""docs/losses.md is what the registry says, and every page says what a reader needs."""

import re
from pathlib import Path

import pytest

from prefkern import losses
from prefkern.training import registry_docs
from prefkern.training.cli import main
from prefkern.training.errors import ConfigError

FILE = Path(__file__).parent.parent / "docs" / "losses.md"


@pytest.fixture(scope="module")
def text() -> str:
    return registry_docs.markdown()


def section(text: str, name: str) -> str:
    """What stands under a heading, up to the next of its kind."""
    return re.search(rf"^## {name}$(.*?)(?=^## |\Z)", text, re.M | re.S)[1]


def test_the_file_is_current(text):
    assert FILE.read_text(encoding="utf-8") == text, "run `make docs`"


def test_the_same_registry_gives_the_same_bytes(text, capsys):
    assert registry_docs.markdown() == text
    assert main(["losses", "--markdown"]) == 0
    assert capsys.readouterr().out == text


def test_links_lead_to_one_heading_each(text):
    headings = [h.lower() for h in re.findall(r"^#+ (.+)$", text, re.M)]
    for target in re.findall(r"\]\(#([^)]+)\)", text):
        assert headings.count(target) == 1, target


def test_tables_are_rectangular_and_code_blocks_closed(text):
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table
    fences = re.findall(r"^```\w*$", text, re.M)
    assert all(fence == "```" for fence in fences[1::2]) and "```" not in fences[::2], "opened and closed in turn"


@pytest.mark.parametrize("name", losses.names())
def test_every_page_is_whole(text, name):
    under, page = section(text, name), registry_docs.page(name)
    cls, loss = losses.loss_class(name), losses.get(name)
    summary = cls.__doc__.splitlines()[0]
    assert summary in under and summary in page
    assert "```text" in under, "the docstring has a formula"
    assert "**Source.**" in under and "Source:" in page
    for column in registry_docs.Needs.of(loss).known:
        assert f"`{column}`" in under and column in page
    for option in registry_docs.options(cls):
        assert f"\n| `{option.name}` | " in under and f"\n{name}.{option.name}: {option.default}\n" in page
        assert option.meaning, f"the docstrings of {name} do not say what {option.name} means"
    if loss.needs_reference:
        assert "- Needs: reference" in under


def test_what_an_option_changes_is_told(text):
    under = section(text, "autoregressive_dpo")
    assert "- With `granularity: boundaries`: also `chosen_boundaries`, `rejected_boundaries`\n" in under
    assert "- With `normalize: mean`: also lengths" in section(text, "anchored_listwise")
    assert "running state" in re.search("- With `shift: running_mean`: (.*)", section(text, "bco"))[1]


def test_a_meaning_that_points_elsewhere_is_looked_up_there():
    [beta] = [o for o in registry_docs.options(losses.loss_class("hinge")) if o.name == "nll_weight"]
    assert beta.meaning.startswith("adds nll_weight times `nll`"), "of the base class"
    [beta] = [o for o in registry_docs.options(losses.loss_class("apo_zero")) if o.name == "beta"]
    assert beta.meaning == "strength of the pull to the reference, in 1/nats.", 'where it says "as in `dpo`"'


def test_one_loss_in_the_terminal(capsys):
    assert main(["losses", "dpo"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("dpo\n===\n\nA classifier of which response is preferred")
    assert "\ndpo.beta: 0.1\n    (0, 100] (0.01 to 0.5 in practice)\n    strength of the pull" in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_an_unknown_loss_is_one_sentence(capsys):
    assert main(["losses", "dppo"]) == 2
    assert capsys.readouterr().err == "prefkern: unknown loss 'dppo': did you mean 'dpo'?\n"
    with pytest.raises(ConfigError, match="unknown loss"):
        registry_docs.page("x")
