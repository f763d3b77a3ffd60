"""Lay build/tree/hmil_fast out of links, so that mypy and import-linter see one package."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    tree = ROOT / "build" / "tree" / "hmil_fast"
    tree.mkdir(parents=True, exist_ok=True)
    for old in tree.iterdir():
        if old.is_symlink():
            old.unlink()
    for entry in (ROOT / "hmil_fast").iterdir():
        if entry.name != "__pycache__":
            (tree / entry.name).symlink_to(entry)
    for name in ("kernels", "io"):
        (tree / name).mkdir(exist_ok=True)
        for old in (tree / name).iterdir():
            if old.is_symlink():
                old.unlink()
        (tree / name / "__init__.py").touch()
        for entry in (ROOT / name).iterdir():
            if entry.name != "__pycache__":
                (tree / name / entry.name).symlink_to(entry)


if __name__ == "__main__":
    main()
