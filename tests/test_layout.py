"""The shape of the source: short files, no console below cli/, and one tree for the linters."""

import ast
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("hmil_fast", "kernels", "io", "bench", "tests")
CALLS = ("print", "input", "exit", "sys.exit")


def python_files() -> list[Path]:
    return [ROOT / "setup.py", *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))]


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in python_files()}
    assert {str(p): n for p, n in lengths.items() if n > 400} == {}


def test_no_module_below_the_command_line_parses_prints_or_exits() -> None:
    talking = {}
    for folder in FOLDERS[:3]:
        for path in (ROOT / folder).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            if not name.startswith("hmil_fast/cli/"):
                talking[name] = console_uses(ast.parse(path.read_text(encoding="utf-8")))
    assert {name: uses for name, uses in talking.items() if uses} == {}


def console_uses(module: ast.Module) -> list[str]:
    """Lines that import argparse or rich, print, or end the process."""
    uses = []
    for node in ast.walk(module):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Call):
            names = [name for name in CALLS if ast.unparse(node.func) == name]
        uses += [
            f"line {node.lineno}: {name}"
            for name in names
            if name in CALLS or name.split(".")[0] in ("argparse", "rich")
        ]
    return uses


def test_the_package_tree_shows_every_module_and_stays_whole_while_it_is_made_again(
    tmp_path: Path,
) -> None:
    for folder in (*FOLDERS[:3], "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            if folder != "tests" or path.name == "package_tree.py":
                (tmp_path / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, tmp_path / path.relative_to(ROOT))
    script = [sys.executable, str(tmp_path / "tests" / "package_tree.py")]
    subprocess.run(script, check=True, timeout=600)
    tree = tmp_path / "build" / "tree" / "hmil_fast"

    def modules() -> set[str]:
        return {str(p.relative_to(tree)) for p in walk(tree) if p.suffix == ".py"}

    first = modules()
    wanted = {
        str(p.relative_to(tmp_path / "hmil_fast")) for p in (tmp_path / "hmil_fast").rglob("*.py")
    }
    for name in ("io", "kernels"):
        wanted |= {str(p.relative_to(tmp_path)) for p in (tmp_path / name).rglob("*.py")}
        wanted.add(f"{name}/__init__.py")
    assert first == wanted

    jobs = [subprocess.Popen(script) for _ in range(3)]
    while any(job.poll() is None for job in jobs):
        assert modules() == first
    assert [job.returncode for job in jobs] == [0, 0, 0]

    (tmp_path / "hmil_fast" / "errors.py").unlink()
    (tmp_path / "io" / "more").mkdir()
    (tmp_path / "io" / "more" / "__init__.py").touch()
    subprocess.run(script, check=True, timeout=600)
    assert modules() == first - {"errors.py"} | {"io/more/__init__.py"}


def walk(folder: Path) -> list[Path]:
    found = []
    for path in folder.iterdir():
        found += walk(path) if path.is_dir() else [path]
    return found


def test_imports_go_one_way() -> None:
    lint = Path(sysconfig.get_path("scripts")) / "lint-imports"
    if not lint.exists():
        pytest.skip("import-linter is in the test extra")
    subprocess.run(
        [sys.executable, str(ROOT / "tests" / "package_tree.py")], check=True, timeout=600
    )
    said = subprocess.run(
        [str(lint), "--config", str(ROOT / "pyproject.toml"), "--no-cache"],
        cwd=ROOT / "build" / "tree",  # the checkout's own hmil_fast/ has no io and no kernels
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert said.returncode == 0, said.stdout
    assert "2 kept, 0 broken" in said.stdout
