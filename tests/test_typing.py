"""mypy finds every module of an editable install, and its types, from any other folder."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import hmil_fast
import hmil_fast.kernels.supcon
from hmil_fast.io.store import open_store

reveal_type(open_store)
reveal_type(hmil_fast.read_labels)
hmil_fast.open_store(7)
"""


@pytest.mark.slow
def test_mypy_checks_a_script_against_an_editable_install(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is in the test extra")
    checkout, python = tmp_path / "checkout", tmp_path / "venv" / "bin" / "python"
    for name in ("hmil_fast", "kernels", "io"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / "tests").mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "tests/package_tree.py"):
        shutil.copy(ROOT / name, checkout / name)

    def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, *map(str, command)]
        return subprocess.run(
            words, cwd=cwd, capture_output=True, text=True, timeout=600, check=False
        )

    build = "from setuptools import build_meta; build_meta.build_editable('dist')"
    run("-c", build, cwd=checkout).check_returncode()
    run("-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path).check_returncode()
    (wheel,) = (checkout / "dist").glob("*.whl")
    options = ("--no-deps", "--no-index", wheel)
    run("-m", "pip", "--python", python, "install", *options, cwd=tmp_path).check_returncode()

    (tmp_path / "script.py").write_text(SCRIPT)
    options = ("--strict", "--python-executable", python, "--cache-dir", tmp_path / "cache")
    done = run("-m", "mypy", *options, "script.py", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    *notes, error, _ = done.stdout.splitlines()
    assert "hmil_fast.io.store.store.FeatureStore" in notes[0]
    assert "hmil_fast.labels.LabelTree" in notes[1]
    assert 'script.py:8: error: Argument 1 to "open_store" has incompatible type "int"' in error
    assert len(notes) == 2
