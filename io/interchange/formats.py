"""The formats by name, and the files of one below a folder."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from hmil_fast.errors import UsageError
from hmil_fast.io.interchange import atlaspatch, clam, npy, pt, stamp, trident
from hmil_fast.io.interchange.bag import Bag, Hints
from hmil_fast.io.interchange.outgoing import Outgoing, Part
from hmil_fast.io.store.layout import slide_id_of


@dataclass(frozen=True)
class Format:
    """How one tool keeps features.

    Attributes:
        name: As the command line calls it.
        suffix: Of its files of features.
        folder: Where they lie below the tool's output folder; a glob pattern, or "".
        read: Opens one file: (path, slide_id, hints).
        parts: Files that one slide becomes: (folder, slide), the one with the features last.
    """

    name: str
    suffix: str
    folder: str
    read: Callable[[Path, str, Hints], AbstractContextManager[Bag]]
    parts: Callable[[Path, Outgoing], list[Part]]


FORMATS = {
    form.name: form
    for form in (
        Format("trident", ".h5", "features_*", trident.read, trident.parts),
        Format("clam", ".h5", clam.FOLDER, clam.read, clam.parts),
        Format("stamp", ".h5", "", stamp.read, stamp.parts),
        Format("atlaspatch", ".h5", "patches", atlaspatch.read, atlaspatch.parts),
        Format("npy", ".npy", "", npy.read, npy.parts),
        Format("pt", ".pt", "pt_files", pt.read, pt.parts),
    )
}


def find_files(form: Format, source: Path) -> list[tuple[str, Path]]:
    """(slide id, path) of a format's files of features: one file, or all below a folder.

    The id is the path below the folder without its suffix; names that an export of ours escaped
    are given back.

    Raises:
        UsageError: nothing there, or several folders of features to choose from.
    """
    if source.is_file():
        return [(_slide_id(source.name, form), source)]
    folders = [p for p in source.glob(form.folder) if p.is_dir()] if form.folder else []
    if len(folders) > 1:
        names = ", ".join(sorted(p.name for p in folders))
        raise UsageError(f"{source} holds several folders of features: {names}", "name one of them")
    folder = folders[0] if folders else source
    found = sorted(
        path
        for path in folder.rglob(f"*{form.suffix}")
        if path.is_file()
        and not path.name.startswith(".")
        and not path.name.endswith(npy.COORDS_SUFFIX)
    )
    if not found:
        raise UsageError(
            f"no {form.suffix} file in {folder}" if folder.exists() else f"{source} does not exist",
            f"name the folder of the features of --format {form.name}",
        )
    return [(_slide_id(p.relative_to(folder).as_posix(), form), p) for p in found]


def _slide_id(name: str, form: Format) -> str:
    name = name.removesuffix(form.suffix)
    return slide_id_of(name) or name
