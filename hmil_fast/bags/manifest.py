"""Write and read splits.json: folds, their slides, and hashes of what they were made from."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from hmil_fast import __version__
from hmil_fast.bags.fold import Fold, check_folds
from hmil_fast.bags.label_file import Slide
from hmil_fast.columns import PARTS
from hmil_fast.errors import UsageError
from hmil_fast.files import write_text
from hmil_fast.io.store import FeatureStore
from hmil_fast.labels import LabelTree

_VERSION = 3
_CONTENT = {  # by version
    1: ("slides", "folds"),
    2: ("made_from", "slides", "folds"),
    3: ("made_from", "made_with", "slides", "folds"),
}
_MAX_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Manifest:
    """What splits.json holds.

    Attributes:
        folds: The folds.
        slides: All slides; label and patient_id are "" where an imported split does not state them.
        made_from: SHA-256 by name, see `sources`.
        made_with: Versions in which the folds were made, see `versions`; empty where unknown.
    """

    folds: list[Fold]
    slides: list[Slide]
    made_from: dict[str, str] = field(default_factory=dict)
    made_with: dict[str, str] = field(default_factory=dict)


def versions() -> dict[str, str]:
    """Versions of what folds depend on beside the labels and the seed."""
    libraries = {name: metadata.version(name) for name in ("scikit-learn", "numpy")}
    return libraries | {"hmil-fast": __version__}


def labels_digest(slides: Sequence[Slide]) -> str:
    """SHA-256 over slide, label, patient and split of every slide, in any order."""
    return _digest(sorted((asdict(s) for s in slides), key=lambda s: str(s["slide_id"])))


def sources(tree: LabelTree, slides: Sequence[Slide], store: FeatureStore) -> dict[str, str]:
    """Hashes of what folds are made from.

    Returns:
        ``labels``: slide, label, patient and split of every slide used, in any order; ``tree``;
        ``slides``: their ids; ``store``: encoder, weights, tiling, dim and dtype; ``features``: the
        content of those slides that the store has.
    """
    ids = sorted(slide.slide_id for slide in slides)
    stored = set(store.slide_ids())
    return {
        "labels": labels_digest(slides),
        "tree": _digest(tree.to_dict()),
        "slides": _digest(ids),
        "store": _digest(store.spec.config_hash),
        "features": _digest([[i, store.record(i).content_digest] for i in ids if i in stored]),
    }


def write_splits(
    path: Path,
    folds: Sequence[Fold],
    slides: Sequence[Slide],
    made_from: Mapping[str, str] | None = None,
    made_with: Mapping[str, str] | None = None,
) -> None:
    """Write the manifest: slides, folds, what they were made from and with, a SHA-256 over all.

    `made_with` is by default what is installed.

    Raises:
        UsageError: A slide or a patient lies in two parts of a fold.
    """
    check_folds(folds, slides, str(path))
    content = {
        "made_from": dict(made_from or {}),
        "made_with": dict(versions() if made_with is None else made_with),
        "slides": [asdict(s) for s in slides],
        "folds": [asdict(f) for f in folds],
    }
    text = json.dumps({"version": _VERSION, "sha256": _digest(content), **content}, indent=1)
    write_text(path, text + "\n")


def read_splits(path: Path) -> tuple[list[Fold], list[Slide]]:
    """The folds and slides of a manifest, as `read_manifest` reads it."""
    manifest = read_manifest(path)
    return manifest.folds, manifest.slides


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest that `write_splits` wrote.

    Raises:
        UsageError: The file is missing, no manifest, changed since, or leaks between parts.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder", f"give a file, for instance {path}/splits.json")
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UsageError(f"{path} is larger than 256 MiB", "give a splits.json")
        data = json.loads(path.read_text(encoding="utf-8"))
        version = int(data["version"])
        if version > _VERSION:
            raise UsageError(f"{path} is of version {version}, newer than this", "update hmil-fast")
        content = {name: data[name] for name in _CONTENT[version]}
        slides = [Slide(**s) for s in data["slides"]]
        folds = [Fold(*(tuple(map(str, f[part])) for part in PARTS)) for f in data["folds"]]
        expected = data["sha256"]
    except OSError as error:
        raise UsageError(f"cannot read the splits {path}: {error}", "check the path") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{path} is not a split manifest ({type(error).__name__}: {error})",
            "use a splits.json that `hmil-fast train` or `hmil-fast splits import` wrote",
        ) from None
    if _digest(content) != expected:
        raise UsageError(
            f"{path} was changed after it was written (its sha256 does not fit)",
            "restore the file, or train anew from the label file",
        )
    check_folds(folds, slides, str(path))
    made = [dict(content.get(name, {})) for name in ("made_from", "made_with")]
    return Manifest(folds, slides, *made)


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
