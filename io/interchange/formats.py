"""Look up formats by name and find a format's files below a folder."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from hmil_fast.errors import UsageError
from hmil_fast.io.interchange import atlaspatch, clam, npy, pt, slide2vec, stamp, trident
from hmil_fast.io.interchange.bag import Bag, Hints
from hmil_fast.io.interchange.outgoing import Outgoing, Part
from hmil_fast.io.store.layout import slide_id_of


@dataclass(frozen=True)
class Format:
    """How one tool keeps features.

    Attributes:
        name: As the command line calls it.
        suffixes: Of its files of features; of a slide with several the first one counts.
        folder: Where they lie below the tool's output folder; a glob pattern, or "".
        read: Opens one file: (path, slide_id, hints).
        parts: Files that one slide becomes: (folder, slide), the one with the features last; None
            where nothing is exported so.
    """

    name: str
    suffixes: tuple[str, ...]
    folder: str
    read: Callable[[Path, str, Hints], AbstractContextManager[Bag]]
    parts: Callable[[Path, Outgoing], list[Part]] | None


FORMATS = {
    form.name: form
    for form in (
        Format("trident", (".h5",), "features_*", trident.read, trident.parts),
        Format("clam", (".h5",), clam.FOLDER, clam.read, clam.parts),
        Format("stamp", (".h5",), "", stamp.read, stamp.parts),
        Format("atlaspatch", (".h5",), "patches", atlaspatch.read, atlaspatch.parts),
        Format("npy", (".npy",), "", npy.read, npy.parts),
        Format("pt", (".pt",), "pt_files", pt.read, pt.parts),
        Format("slide2vec", slide2vec.SUFFIXES, slide2vec.FOLDER, slide2vec.read, None),
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
    found: dict[str, Path] = {}
    for suffix in form.suffixes:
        for path in sorted(folder.rglob(f"*{suffix}")):
            beside = path.name.endswith((npy.COORDS_SUFFIX, *slide2vec.COORDS_SUFFIXES))
            if path.is_file() and not path.name.startswith(".") and not beside:
                found.setdefault(_slide_id(path.relative_to(folder).as_posix(), form), path)
    if not found:
        raise UsageError(
            f"no {form.suffixes[0]} file in {folder}"
            if folder.exists()
            else f"{source} does not exist",
            f"name the folder of the features of --format {form.name}",
        )
    return sorted(found.items(), key=lambda item: item[1])


def _slide_id(name: str, form: Format) -> str:
    name = next((name.removesuffix(s) for s in form.suffixes if name.endswith(s)), name)
    return slide_id_of(name) or name
