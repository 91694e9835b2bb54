"""What the README shows is true: Python runs, YAML and command lines are accepted, files named are there."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from prefkern import losses
from prefkern.training.cli import build_parser
from prefkern.training.config import Config
from prefkern.training.resolve import resolve_loss, resolve_trainer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", README, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^ *```.*?^ *```", "", README, flags=re.MULTILINE | re.DOTALL)
MAKEFILE = (ROOT / "Makefile").read_text()


def blocks(*languages: str) -> list[str]:
    return [text for language, text in BLOCKS if language in languages]


def command_lines() -> list[str]:
    """Commands of shell blocks (of `console` blocks, the lines after a `$`) and of code spans in the text."""
    shell = "\n".join(blocks("bash", "sh", "shell"))
    console = "\n".join(re.findall(r"^\s*\$ (.*)$", "\n".join(blocks("console")), re.MULTILINE))
    spans = "\n".join(re.findall(r"`((?:prefkern|make|pip|python) [^`\n]+)`", PROSE))
    lines = re.sub(r"\\\n\s*", " ", f"{shell}\n{console}\n{spans}").splitlines()
    return list(dict.fromkeys(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")))


def check_command(words: list[str]) -> None:
    """Raise AssertionError, or SystemExit from the command line's own parser, on a command that would not work."""
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    name, rest = Path(words[0]).name, words[1:]
    if name == "prefkern":
        build_parser(with_demo=rest[:1] == ["demo"]).parse_args(rest)
    elif name == "make":
        targets = [word for word in rest if "=" not in word]
        phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split()
        assert targets and set(targets) <= set(phony), f"make has no target {targets}"
        for variable in (word.partition("=")[0] for word in rest if "=" in word):
            assert f"$({variable})" in MAKEFILE or f"$(or $({variable})," in MAKEFILE, f"Makefile knows no {variable}"
    elif name in ("python", "python3"):
        assert rest[0] == "-m" and importlib.util.find_spec(rest[1]), f"no module {rest[1]}"
        for path in (word.partition("::")[0] for word in rest[2:] if "/" in word):
            assert (ROOT / path).exists(), f"{path} is not there"
    else:
        assert words[:2] in (["pip", "install"], ["git", "clone"]) or name == "cd", "a command this test does not know"


def tree_paths() -> list[str]:
    """Paths in blocks that print the tree: folders end in a slash, indentation nests, commas part names."""
    paths = []
    for text in (text for _, text in BLOCKS if re.match(r"\s*[\w.]+/(\s|$)", text)):
        folders: list[tuple[int, str]] = []
        for line in filter(str.strip, text.splitlines()):
            indent = len(line) - len(line.lstrip())
            while folders and folders[-1][0] >= indent:
                folders.pop()
            base = "".join(folder for _, folder in folders)
            names = re.match(r"\s*([\w./-]+(?:, ?[\w./-]+)*)", line)[1].replace(" ", "").split(",")
            paths += [base + name for name in names]
            if names[-1].endswith("/"):
                folders.append((indent, names[-1]))
    return paths


def test_readme_shows_the_two_commands_and_all_kinds_of_blocks():
    """The other tests pass on an empty README; this one does not."""
    assert {"make test", "make demo"} <= set(command_lines())
    assert blocks("python") and blocks("yaml") and tree_paths()


def test_python_blocks_run(tmp_path: Path):
    """In order and in one process, since later blocks may use names of earlier ones."""
    script = "import sys\nscope = {'__name__': '__main__'}\n"
    for number, text in enumerate(blocks("python"), 1):
        script += f"exec(compile({text!r}, 'README block {number}', 'exec'), scope)\n"
    environ = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_blocks_are_configurations(text: str):
    """A block may hold some of the sections: the others are filled in with the least."""
    least = {"model": {"name": "any"}, "data": {"train": "any.jsonl"}, "loss": {"name": "dpo"}}
    config = Config.from_dict({**least, **yaml.safe_load(text)})
    loss = resolve_loss(config.loss)
    resolve_trainer(config, loss)


@pytest.mark.parametrize("line", command_lines())
def test_command_lines_are_accepted(line: str):
    for part in re.split(r"&&|;|\|", line.partition(" # ")[0]):
        check_command(shlex.split(part))


@pytest.mark.parametrize("path", tree_paths())
def test_files_of_the_tree_exist(path: str):
    assert (ROOT / path).exists()


def test_links_to_files_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)", PROSE):
        assert target.startswith(("https://", "http://", "mailto:")) or (ROOT / target).exists(), target


def test_table_of_losses_names_every_one_and_no_other():
    table = README[README.index("| losses |") :].partition("\n\n")[0]
    named = [name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(named) == sorted(losses.names())
