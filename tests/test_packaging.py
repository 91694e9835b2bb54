"""The package as users meet it: checkout, PYTHONPATH, editable install, wheel and sdist, each used from elsewhere.

Environments are fresh, but see the packages of the running one, so nothing is downloaded.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import prefkern

ROOT = Path(__file__).parent.parent
TREE = [
    ".ci", "CHANGELOG.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "bench", "constraints.txt", "docs",
    "kernels", "prefkern", "pyproject.toml", "setup.py", "tests", "training",
]  # fmt: skip
# Imported name of a package where it is not the name it is installed by.
DISTRIBUTION = {"yaml": "pyyaml"}
USE = """
import prefkern, prefkern.kernels.tuning, prefkern.training.config
from prefkern.training.cli import main
print(prefkern.__file__, prefkern.kernels.tuning.__file__, prefkern.training.config.__file__, sep="\\n")
main(["--version"])
"""


def run(*command: str | Path, cwd: Path, **environ: str) -> str:
    """Standard output of a command that must succeed, run without the caller's PYTHONPATH."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=clean | environ, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    """A copy of the checkout: building writes beside the sources."""
    copy = tmp_path_factory.mktemp("copy") / "checkout"
    copy.mkdir()
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "results", "*.so"))
        else:
            shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="session")
def archives(tree: Path) -> dict[str, Path]:
    """The wheel and the sdist, built from the copy as a build front end does it."""
    dist = tree.parent / "dist"
    dist.mkdir()
    for what in ("sdist", "wheel"):
        script = f"from setuptools import build_meta; build_meta.build_{what}({str(dist)!r})"
        run(sys.executable, "-c", script, cwd=tree)
    shutil.rmtree(tree / "build", ignore_errors=True)
    return {"wheel": next(dist.glob("*.whl")), "sdist": next(dist.glob("*.tar.gz"))}


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """Python of a fresh environment that sees the running one's packages, but no installed prefkern of its own."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    # Directories named in a .pth file come last and have their own .pth files ignored, such as an editable prefkern's.
    Path(site, "running.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    return python


def install(python: Path, *what: str | Path) -> None:
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", "--no-build-isolation"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *what, cwd=python.parent)


def imported_from(python: Path, cwd: Path, **environ: str) -> list[Path]:
    """Files that prefkern and its two outlying parts are imported from; `--version` must work there too."""
    *files, version = run(python, "-c", USE, cwd=cwd, **environ).splitlines()
    assert version == f"prefkern {prefkern.__version__}"
    return [Path(file).resolve() for file in files]


def sources(root: Path) -> list[Path]:
    """Where the three files of `imported_from` lie in a checkout."""
    return [(root / name).resolve() for name in ("prefkern/__init__.py", "kernels/tuning.py", "training/config.py")]


def test_from_the_root_of_a_checkout(tree: Path):
    assert imported_from(sys.executable, cwd=tree) == sources(tree)


def test_through_pythonpath(tree: Path, tmp_path: Path):
    assert imported_from(sys.executable, cwd=tmp_path, PYTHONPATH=str(tree)) == sources(tree)


@pytest.mark.slow
def test_editable_install(tree: Path, environment: Path, tmp_path: Path):
    install(environment, "--editable", tree)
    assert imported_from(environment, cwd=tmp_path) == sources(tree)
    assert run(environment.with_name("prefkern"), "--version", cwd=tmp_path) == f"prefkern {prefkern.__version__}\n"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_installed_archive(kind: str, archives: dict[str, Path], environment: Path, tmp_path: Path):
    install(environment, archives[kind])
    files = imported_from(environment, cwd=tmp_path)
    package = files[0].parent
    assert package.is_relative_to(environment.parent.parent)
    assert files[1:] == [package / "kernels" / "tuning.py", package / "training" / "config.py"]
    assert run(environment.with_name("prefkern"), "--version", cwd=tmp_path) == f"prefkern {prefkern.__version__}\n"


@pytest.mark.slow
def test_wheel_holds_the_package_alone(tree: Path, archives: dict[str, Path]):
    with zipfile.ZipFile(archives["wheel"]) as wheel:
        names = set(wheel.namelist())
    files = {name for name in names if ".dist-info/" not in name}
    expected = {"prefkern/py.typed"}
    for folder, place in (("prefkern", "prefkern"), ("kernels", "prefkern/kernels"), ("training", "prefkern/training")):
        expected |= {f"{place}/{path.relative_to(tree / folder)}" for path in (tree / folder).rglob("*.py")}
    built = {name for name in files if name.startswith("prefkern/kernels/_")}
    assert files - built == expected
    assert {name.partition(".")[0] for name in built} == (
        {f"prefkern/kernels/_{name}" for name in ("row_softmax_cpu", "product_cpu")} if shutil.which("c++") else set()
    )
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_sdist_holds_what_building_and_testing_need(tree: Path, archives: dict[str, Path]):
    with tarfile.open(archives["sdist"]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    expected = {".ci/run"} | {name for name in TREE if (tree / name).is_file()}
    for folder in ("bench", "kernels", "prefkern", "tests", "training"):
        expected |= {str(path.relative_to(tree)) for path in (tree / folder).rglob("*.py")}
        expected |= {
            str(path.relative_to(tree)) for ending in ("cpp", "h") for path in (tree / folder).rglob(f"*.{ending}")
        }
    expected |= {str(path.relative_to(tree)) for path in (tree / "tests").rglob("*.json")}
    assert expected <= names


@pytest.mark.slow
def test_metadata_speaks_of_this_version_and_readme(tree: Path, archives: dict[str, Path]):
    with zipfile.ZipFile(archives["wheel"]) as wheel:
        metadata = wheel.read(f"prefkern-{prefkern.__version__}.dist-info/METADATA").decode()
    assert f"\nVersion: {prefkern.__version__}\n" in metadata
    assert (tree / "README.md").read_text(encoding="utf-8").strip() in metadata


def declared() -> dict[str, str]:
    """Requirements of setup.py by normalised name, those of the extras too."""
    return {_name(text): text for text in _requirements()}


def _requirements() -> list[str]:
    call = next(node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if _is_setup(node))
    options = {keyword.arg: keyword.value for keyword in call.keywords}
    extras = ast.literal_eval(options["extras_require"])
    return [*ast.literal_eval(options["install_requires"]), *(text for extra in extras.values() for text in extra)]


def _is_setup(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setup"


def _name(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def test_every_import_is_a_declared_requirement():
    found = set()
    for folder in ("prefkern", "kernels", "training"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    found.add(node.module.split(".")[0])
    third_party = found - set(sys.stdlib_module_names) - {"prefkern"}
    assert {DISTRIBUTION.get(name, name) for name in third_party} <= declared().keys()


def test_constraints_pin_every_requirement_exactly():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+(; python_version (<|>=) '3\.11')?", line) for line in lines)
    assert declared().keys() <= {_name(line) for line in lines}
