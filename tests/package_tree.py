"""Lay build/tree/hmil_fast out of links, so that mypy and import-linter see one package.

Links that are right already stay: a linter that runs meanwhile misses no module.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    tree = ROOT / "build" / "tree" / "hmil_fast"
    folders = ("kernels", "io")
    for name in folders:
        link_all(ROOT / name, tree / name)
        (tree / name / "__init__.py").touch()
    link_all(ROOT / "hmil_fast", tree, keep=folders)


def link_all(source: Path, target: Path, keep: tuple[str, ...] = ()) -> None:
    target.mkdir(parents=True, exist_ok=True)
    wanted = {entry.name: entry for entry in source.iterdir() if entry.name != "__pycache__"}
    for old in target.iterdir():
        if old.is_symlink() and old.name not in wanted:
            old.unlink(missing_ok=True)
    for name, entry in wanted.items():
        link = target / name
        if name not in keep and not (link.is_symlink() and link.readlink() == entry):
            beside = target / f"{name}.{os.getpid()}"
            beside.symlink_to(entry)
            beside.replace(link)


if __name__ == "__main__":
    main()
