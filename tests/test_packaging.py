"""What is installed is what lies in the three folders, and it imports from anywhere."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hmil_fast import __version__

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"hmil_fast": "hmil_fast", "kernels": "hmil_fast/kernels", "io": "hmil_fast/io"}
NOT_SHIPPED = ("__pycache__", "*.pyc", "build", "dist", "*.egg-info")


def sources(root: Path) -> dict[str, Path]:
    """Files of a checkout by the name they must have in the wheel."""
    return {
        f"{target}/{path.relative_to(root / folder).as_posix()}": path
        for folder, target in FOLDERS.items()
        for path in (root / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    # no bytecode: other tests look at the folders meanwhile
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**env, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline from a copy: setuptools takes what an old build/ holds along."""
    pytest.importorskip("build", reason="the package `build` is in the test extra")
    pytest.importorskip("setuptools", minversion="77", reason="needs setuptools >= 77 beside it")
    copy = tmp_path_factory.mktemp("copy")
    ignore = shutil.ignore_patterns(*NOT_SHIPPED)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    options = ("--wheel", "--no-isolation", "--outdir", "dist", ".")
    built = run(sys.executable, "-m", "build", *options, cwd=copy)
    assert built.returncode == 0, built.stderr + built.stdout
    return next((copy / "dist").glob("hmil_fast-*.whl"))


def test_the_wheel_holds_the_three_folders_and_nothing_else(wheel: Path) -> None:
    wanted = sources(wheel.parent.parent)
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        assert names == set(wanted)
        assert all(archive.read(name) == wanted[name].read_bytes() for name in names)
    for name in (
        "demo/data/tiles.zip",
        "report/html/page.html",
        "py.typed",
        "io/store/store.py",
    ):
        assert f"hmil_fast/{name}" in names


def test_the_version_is_that_of_the_package_and_the_changelog_knows_it(wheel: Path) -> None:
    assert wheel.name.split("-")[1] == __version__
    headings = re.findall("^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert headings[0] == "Unreleased"
    assert __version__ in headings
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "version" not in project
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert "version" not in citation


def test_the_workflow_and_the_hooks_run_what_is_here() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["test"]
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    script = ROOT / job["steps"][-1]["run"]
    assert os.access(script, os.X_OK)
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").iterdir():
        assert yaml.safe_load(path.read_text(encoding="utf-8"))
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["id"] for hook in hooks] == ["ruff", "ruff-format"]


def test_every_link_of_the_documentation_leads_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    dead = [
        f"{page.relative_to(ROOT)}: {link}"
        for page in pages
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
        if "://" not in link and not (page.parent / link).exists()
    ]
    assert dead == []


@pytest.mark.slow
def test_the_installed_command_answers_without_any_dependency(wheel: Path, tmp_path: Path) -> None:
    made = run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    if not run(sys.executable, "-m", "pip", "--version", cwd=tmp_path).stdout:
        pytest.skip("no pip in this environment")
    python = tmp_path / "venv" / "bin" / "python"
    install = ("pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    installed = run(sys.executable, "-m", *install, cwd=tmp_path)
    assert installed.returncode == 0, installed.stderr
    said = run(tmp_path / "venv" / "bin" / "hmil-fast", "--help", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "demo" in said.stdout
    for command in ("train", "extract", "predict", "heatmap", "store", "report", "bench"):
        said = run(tmp_path / "venv" / "bin" / "hmil-fast", command, "--help", cwd=tmp_path)
        assert said.returncode == 0, said.stderr
    where = run(python, "-c", "import hmil_fast.kernels, hmil_fast.io; print('both')", cwd=tmp_path)
    assert where.stdout == "both\n", where.stderr
    assert run(python, "-c", "import kernels", cwd=tmp_path).returncode == 1


def test_every_dependency_has_a_tested_release_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"]
    for extra, more in project["optional-dependencies"].items():
        lines += more if extra != "cu12" else []
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = {canonicalize_name(name): release for name, release in (p.split("==") for p in pins)}
    for wanted in map(Requirement, lines):
        if wanted.name != "hmil-fast":
            assert wanted.specifier.contains(tested[canonicalize_name(wanted.name)]), wanted


@pytest.mark.parametrize("folder", ["io", "kernels"])
def test_the_top_folders_are_no_packages_of_their_own(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()
    inner = [p for p in (ROOT / folder).iterdir() if p.is_dir() and p.name != "__pycache__"]
    assert inner
    assert all((p / "__init__.py").is_file() for p in inner)
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_no_file_is_named_like_a_dependency() -> None:
    names = "zarr triton torch numpy cucim nvidia openslide tifffile timm numcodecs dask yaml PIL"
    names += " torchvision sklearn skimage matplotlib rich safetensors tensorboard scipy"
    for folder in FOLDERS:
        found = {p.stem for p in (ROOT / folder).rglob("*") if p.suffix in ("", ".py")}
        assert not found & set(names.split())


@pytest.mark.slow
@pytest.mark.parametrize("where", ["root", "below", "elsewhere"])
@pytest.mark.parametrize("how", ["-c", "-m"])
def test_the_checkout_imports_from_any_folder(where: str, how: str, tmp_path: Path) -> None:
    cwd = {"root": ROOT, "below": ROOT / "io" / "store", "elsewhere": tmp_path}[where]
    if how == "-m":  # the current folder comes first on the path
        said = run(sys.executable, "-m", "timeit", "-n", "1", "-r", "1", PROBE, cwd=cwd)
        said.stdout = said.stdout.split("1 loop")[0]
    else:
        said = run(sys.executable, "-c", PROBE, cwd=cwd)
    assert said.returncode == 0, said.stderr
    stdlib, store, supcon = said.stdout.split()
    assert Path(stdlib).parent == Path(sysconfig.get_path("stdlib")).resolve()
    assert Path(store) == ROOT / "io" / "store" / "__init__.py"
    assert Path(supcon) == ROOT / "kernels" / "supcon" / "__init__.py"


PROBE = """
import io, pathlib
import hmil_fast.io.store, hmil_fast.kernels.supcon
assert io.BytesIO
for module in (io, hmil_fast.io.store, hmil_fast.kernels.supcon):
    print(pathlib.Path(module.__file__ or io.__spec__.origin).resolve())
"""


def test_spawned_workers_find_the_same_packages(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(SPAWN)
    said = run(sys.executable, tmp_path / "job.py", cwd=ROOT)
    assert said.stdout == "hmil_fast.io.store\n", said.stderr


SPAWN = """
import multiprocessing

def work(_):
    import hmil_fast.io.store
    return hmil_fast.io.store.__name__

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(work, [0])[0])
"""
