"""The run folder: what a run was told, on what it was trained, and what it predicted.

config.yaml  tree.json  splits.json  run.json (the store it was trained on, what its preset meant)
fold-<i>/best.safetensors  last.safetensors (until the fold is done)  predictions.csv
         val_predictions.csv (what calibration and conformal answers are fitted on)
log.jsonl  tensorboard/  predictions.csv  metrics.json  conformal.csv  views/  report.html
baseline/   the same again for the baseline on the same splits
"""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from hmil_fast.bags.manifest import sources
from hmil_fast.bags.splits import Fold, Slide, read_splits, write_splits
from hmil_fast.config import TrainConfig, load_config, loss_settings
from hmil_fast.errors import HmilError, UsageError
from hmil_fast.io.store import FeatureStore, SlideRecord, at_scale, backend, join_scales
from hmil_fast.labels import LabelTree


@dataclass(frozen=True)
class Run:
    """A run folder that has been set up.

    Attributes:
        store: What the vectors of its store mean, see `store_identity`.
        features: Digest of the features by slide id; of runs of older versions none.
    """

    path: Path
    config: TrainConfig
    tree: LabelTree
    folds: list[Fold]
    slides: list[Slide]
    store: dict[str, Any]
    features: dict[str, str] = field(default_factory=dict)

    @property
    def sums(self) -> bool:
        """Whether the leaves alone decide, and the heads above them do not."""
        return loss_settings(self.config).coarse == "sum"

    def fold_path(self, fold: int) -> Path:
        """Folder of one fold."""
        return self.path / f"fold-{fold}"

    def val_path(self, fold: int) -> Path:
        """Predictions of one fold's validation slides by its best weights."""
        return self.fold_path(fold) / "val_predictions.csv"

    def is_done(self, fold: int) -> bool:
        """Whether a fold is trained to its end: its best weights and its predictions are there."""
        names = ("best.safetensors", "predictions.csv")
        return all((self.fold_path(fold) / name).exists() for name in names)

    def fitting(self, store: FeatureStore) -> FeatureStore:
        """The store, where it has several scales at the run's, or all if the run was on all.

        Raises:
            UsageError: Its vectors mean something else than those trained on: another encoder,
                other weights, other tiles or no such scale.
        """
        if self.store["tiling"].get("coarser"):
            store = join_scales(store)
        elif len(store.spec.scales) > 1:
            store = at_scale(store, self.store["tiling"].get("mpp"))
        unlike = _unlike_stores(store_identity(store), self.store)
        if unlike and not self.trained_on(store):
            imported = "imported_from" in self.store["encoder"]
            raise UsageError(
                f"the store {store.path} is not of the kind that the run {self.path} was trained "
                f"on: {'; '.join(_said(*each) for each in unlike)}",
                f"import features of these slides with --encoder {self.store['encoder']['name']}"
                if imported
                else "extract these slides with the run's --encoder, --weights and --tile, and "
                "with the same list of --mpp",
            )
        return store

    def changed(self, store: FeatureStore) -> list[str]:
        """Its slides whose features in the store are no more those that it was trained on."""
        records = _records(store, self.features)
        return [s for s, record in records.items() if not record.holds_features(self.features[s])]

    def trained_on(self, store: FeatureStore) -> bool:
        """Whether the store has a slide of the run as it was; a store is of one kind."""
        return any(
            record.num_tiles and record.holds_features(self.features[slide_id])
            for slide_id, record in _records(store, self.features).items()
        )


def store_identity(store: FeatureStore) -> dict[str, Any]:
    """What a run remembers of its store: what the vectors of its plain tiles mean."""
    spec = store.spec
    tiling = {name: value for name, value in spec.tiling.items() if name != "views"}
    return {"dim": spec.dim, "encoder": dict(spec.encoder), "tiling": tiling}


def _records(store: FeatureStore, slide_ids: Iterable[str]) -> dict[str, SlideRecord]:
    """The records of those slides that the store has."""
    stored = set(store.slide_ids())
    records = backend.each(store.path, store.record, [s for s in slide_ids if s in stored])
    return {record.slide_id: record for record in records}


def _meant(config: TrainConfig) -> dict[str, Any]:
    """All settings, with the values that the preset gives."""
    return asdict(config) | asdict(loss_settings(config))


def _unlike(
    ours: dict[str, Any], theirs: dict[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """Names of the values in which two nested mappings differ, with both values."""
    found = []
    for name in ours | theirs:
        a, b = ours.get(name), theirs.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _unlike(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append((f"{prefix}{name}", a, b))
    return found


def _unlike_stores(ours: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """`_unlike` of two identities; of two imports only what both state."""
    unlike = _unlike(ours, theirs)
    if not all("imported_from" in each["encoder"] for each in (ours, theirs)):
        return unlike
    return [
        (name, a, b)
        for name, a, b in unlike
        if not name.endswith(".imported_from") and None not in (a, b)
    ]


def _said(name: str, ours: Any, theirs: Any) -> str:
    """A difference for people: of the store's value, and the run's."""
    if name != "tiling.around":
        return f"{name} is {ours!r}, was {theirs!r}"
    # tiles of a coarse scale: also those with little tissue that hold a tile of the finer one
    how = [
        "laid by themselves" if mpp is None else f"laid around those at {mpp:g} µm per px"
        for mpp in (ours, theirs)
    ]
    return f"its tiles are {how[0]}, the run's were {how[1]}"


def create_run(
    path: Path,
    config: TrainConfig,
    tree: LabelTree,
    split: tuple[list[Fold], list[Slide]],
    store: FeatureStore,
    made_with: Mapping[str, str] | None = None,
) -> Run:
    """Set up a run folder, or open it if it was set up for the very same run.

    `made_with` are the versions in which the folds were made; by default those installed.

    Raises:
        UsageError: The folder holds another run, or something else; nothing in it is touched.
    """
    folds, slides = split
    features = {
        slide_id: record.features_digest or record.content_digest
        for slide_id, record in _records(store, [slide.slide_id for slide in slides]).items()
    }
    run = Run(path, config, tree, folds, slides, store_identity(store), features)
    if (path / "config.yaml").exists():
        there = open_run(path)
        changed = there.changed(store)
        other = [] if there.trained_on(store) else _unlike_stores(run.store, there.store)
        same = {
            "settings": there.config == config,
            "label tree": there.tree == tree,
            "labels or splits": (there.folds, there.slides) == (folds, slides),
            "store": not other,
            f"features of {len(changed)} slides, {', '.join(changed[:5])}": not changed,
        }
        if not all(same.values()):
            unlike = _unlike(_meant(config), _meant(there.config))
            detail = "; ".join(_said(*each) for each in unlike + other)
            raise UsageError(
                f"the run folder {path} was set up with other "
                + ", ".join(name for name, equal in same.items() if not equal)
                + (f" ({detail})" if detail else ""),
                "give another --out, what it was set up with, or --overwrite",
            )
        return there
    if path.exists() and not (path.is_dir() and all(map(_is_setup, path.iterdir()))):
        raise UsageError(f"{path} exists and is no run folder", "give another --out")
    make_folder(path)
    write_splits(path / "splits.json", folds, slides, sources(tree, slides, store), made_with)
    write_json(path / "tree.json", tree.to_dict())
    taught = {"settings": asdict(loss_settings(config)), "features": features}
    write_json(path / "run.json", run.store | taught)
    write_text(path / "config.yaml", config.to_yaml())  # last: it makes the folder a run
    return run


def make_folder(path: Path) -> None:
    """Make a folder and those above it.

    Raises:
        UsageError: It cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from None


@contextmanager
def set_up_for_nothing(runs: Sequence[Run]) -> Iterator[None]:
    """Delete what `create_run` wrote of untrained runs if the block is refused.

    Else it would be in the way of the command put right.
    """
    try:
        yield
    except HmilError:
        for run in reversed(runs):
            for name in ("config.yaml", "run.json", "tree.json", "splits.json"):
                (run.path / name).unlink(missing_ok=True)
            with suppress(OSError):  # more lies there
                run.path.rmdir()
        raise


def _is_setup(entry: Path) -> bool:
    """Whether a file is one that `create_run`, had it been killed, would have left."""
    return entry.name.startswith(("splits.json", "tree.json", "run.json", "config.yaml."))


def _cannot_write(path: Path, error: OSError) -> UsageError:
    return UsageError(f"cannot write {path}: {error.strerror}", "name a place you can write to")


def open_run(path: Path) -> Run:
    """Open a run folder.

    Raises:
        UsageError: It is none, or a file in it is damaged.
    """
    if not (path / "config.yaml").exists():
        raise UsageError(
            f"{path} is no run folder (no config.yaml)", "name the --out of a training"
        )
    try:
        tree = LabelTree.from_dict(json.loads((path / "tree.json").read_text("utf-8")))
        store = dict(json.loads((path / "run.json").read_text("utf-8")))
        taught, features = dict(store.pop("settings", {})), dict(store.pop("features", {}))
        store = {name: store[name] for name in ("dim", "encoder", "tiling")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"the run folder {path} is damaged: {error}", "train anew") from None
    folds, slides = read_splits(path / "splits.json")
    config = load_config(path / "config.yaml")
    # a preset of another version may mean something else: the run keeps to what it was taught
    now = asdict(loss_settings(config))
    kept = {name: value for name, value in taught.items() if now.get(name, value) != value}
    return Run(path, replace(config, **kept), tree, folds, slides, store, features)


def write_csv(to: Path | TextIO, rows: Iterable[Sequence[object]]) -> None:
    """Write rows as CSV; a file gets its name once it is whole.

    Raises:
        UsageError: The file cannot be written.
    """
    if isinstance(to, Path):
        partial = _partial(to)
        try:
            with partial.open("w", newline="", encoding="utf-8") as file:
                write_csv(file, rows)
            partial.replace(to)
        except OSError as error:
            raise _cannot_write(to, error) from None
        return
    csv.writer(to, lineterminator="\n").writerows(rows)


def write_json(path: Path, value: object) -> None:
    """Write JSON under its final name in one step."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text under its final name in one step."""
    partial = _partial(path)
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.partial")
