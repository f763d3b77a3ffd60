"""Run folder: config, splits, checkpoints, predictions.

config.yaml (all settings)  tree.json  splits.json  run.json (the store it was trained on)
fold-<i>/best.safetensors  last.safetensors (until the fold is done)  predictions.csv
         val_predictions.csv (what calibration and conformal answers are fitted on)
log.jsonl  tensorboard/  predictions.csv  metrics.json  conformal.csv  views/  report.html
baseline/   the same again for the baseline on the same splits
"""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any, TextIO

from hmil_fast.bags.manifest import sources
from hmil_fast.bags.splits import Fold, Slide, read_splits, write_splits
from hmil_fast.config import Runtime, TrainConfig, load_config, load_runtime
from hmil_fast.errors import HmilError, UsageError
from hmil_fast.files import write_text
from hmil_fast.io.store import FeatureStore, SlideRecord, at_scale, join_scales
from hmil_fast.io.store.backend import backend_of
from hmil_fast.labels import LabelTree
from hmil_fast.runs.differences import (
    describe,
    differences,
    store_differences,
    store_identity,
)


@dataclass(frozen=True)
class Run:
    """A run folder that has been set up.

    Attributes:
        store: Identity of its store, see `store_identity`.
        features: Digest of the features by slide id; empty for runs of older versions.
        precision: Precision that the training was told to use, see `Runtime`.
    """

    path: Path
    config: TrainConfig
    tree: LabelTree
    folds: list[Fold]
    slides: list[Slide]
    store: dict[str, Any]
    features: dict[str, str] = field(default_factory=dict)
    precision: str = "auto"

    @property
    def sums(self) -> bool:
        """Tell whether the leaves alone decide, without the heads above them."""
        return self.config.recipe.coarse == "sum"

    def precision_for(self, runtime: Runtime) -> str:
        """Return the precision of `runtime`; for "auto" the one that training was told to use."""
        return self.precision if runtime.precision == "auto" else runtime.precision

    def fold_path(self, fold: int) -> Path:
        """Folder of one fold."""
        return self.path / f"fold-{fold}"

    def val_path(self, fold: int) -> Path:
        """Predictions of one fold's validation slides by its best weights."""
        return self.fold_path(fold) / "val_predictions.csv"

    def is_done(self, fold: int) -> bool:
        """Tell whether a fold is trained to its end: best weights and predictions exist."""
        names = ("best.safetensors", "predictions.csv")
        return all((self.fold_path(fold) / name).exists() for name in names)

    def at_run_scales(self, store: FeatureStore) -> FeatureStore:
        """Return the store at the scales that the run was trained on.

        Raises:
            UsageError: Its features are of another kind than those trained on: another encoder,
                other weights, other tiles, or no such scale.
        """
        if self.store["tiling"].get("coarser"):
            store = join_scales(store)
        elif len(store.spec.scales) > 1:
            store = at_scale(store, self.store["tiling"].get("mpp"))
        changes = store_differences(store_identity(store), self.store)
        if changes and not self.trained_on(store):
            imported = "imported_from" in self.store["encoder"]
            raise UsageError(
                f"the store {store.path} is not of the kind that the run {self.path} was trained "
                f"on: {'; '.join(map(describe, changes))}",
                f"import features of these slides with --encoder {self.store['encoder']['name']}"
                if imported
                else "extract these slides with the run's --encoder, --weights and --tile-size, "
                "and with the same list of --mpp",
            )
        return store

    def changed(self, store: FeatureStore) -> list[str]:
        """List its slides whose features in the store differ from those that it was trained on."""
        records = _records(store, self.features)
        return [s for s, record in records.items() if not record.holds_features(self.features[s])]

    def trained_on(self, store: FeatureStore) -> bool:
        """Tell whether the store has a slide with the features that the run was trained on."""
        return any(
            record.num_tiles and record.holds_features(self.features[slide_id])
            for slide_id, record in _records(store, self.features).items()
        )


def _records(store: FeatureStore, slide_ids: Iterable[str]) -> dict[str, SlideRecord]:
    """Return the records of those slides that the store has."""
    stored = set(store.slide_ids())
    records = backend_of(store.path).map(store.record, [s for s in slide_ids if s in stored])
    return {record.slide_id: record for record in records}


def create_run(
    path: Path,
    config: TrainConfig,
    tree: LabelTree,
    split: tuple[list[Fold], list[Slide]],
    store: FeatureStore,
    made_with: Mapping[str, str] | None = None,
    precision: str = "auto",
) -> Run:
    """Set up a run folder, or open it if it was set up for the same run.

    Args:
        path: The folder.
        config: Data, folds and recipe.
        tree: The label tree.
        split: Folds, and the slides in them.
        store: Features of these slides.
        made_with: Versions in which the folds were made; by default those installed.
        precision: Precision that the training is told to use, see `Runtime`.

    Raises:
        UsageError: The folder holds another run, or something else; it is left as it is.
    """
    folds, slides = split
    features = {
        slide_id: record.features_digest or record.content_digest
        for slide_id, record in _records(store, [slide.slide_id for slide in slides]).items()
    }
    run = Run(path, config, tree, folds, slides, store_identity(store), features, precision)
    if (path / "config.yaml").exists():
        there = open_run(path)
        changed = there.changed(store)
        other = [] if there.trained_on(store) else store_differences(run.store, there.store)
        same = {
            "settings": there.config == config,
            "label tree": there.tree == tree,
            "labels or splits": (there.folds, there.slides) == (folds, slides),
            "store": not other,
            f"features of {len(changed)} slides, {', '.join(changed[:5])}": not changed,
        }
        if not all(same.values()):
            changes = differences(config.values(), there.config.values())
            detail = "; ".join(map(describe, changes + other))
            raise UsageError(
                f"the run folder {path} was set up with other "
                + ", ".join(name for name, equal in same.items() if not equal)
                + (f" ({detail})" if detail else ""),
                "give another --out, what it was set up with, or --overwrite",
            )
        return there
    if path.exists() and not (path.is_dir() and all(map(_is_setup, path.iterdir()))):
        raise UsageError(f"{path} exists and is not a run folder", "give another --out")
    make_folder(path)
    write_splits(path / "splits.json", folds, slides, sources(tree, slides, store), made_with)
    write_json(path / "tree.json", tree.to_dict())
    facts = {"features": features, "precision": precision}
    write_json(path / "run.json", run.store | facts)
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
def removed_if_refused(runs: Sequence[Run]) -> Iterator[None]:
    """Remove newly created runs if setup fails in the block, so the corrected command can run."""
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
    """Tell whether a killed `create_run` can have left this file."""
    return entry.name.startswith(("splits.json", "tree.json", "run.json", "config.yaml."))


def _cannot_write(path: Path, error: OSError) -> UsageError:
    return UsageError(f"cannot write {path}: {error.strerror}", "name a place you can write to")


def open_run(path: Path | str) -> Run:
    """Open a run folder.

    Raises:
        UsageError: It is not a run folder, or a file in it is damaged.

    Example:
        >>> import hmil_fast
        >>> hmil_fast.open_run("run").config.folds
        2
    """
    path = Path(path)
    if not (path / "config.yaml").exists():
        raise UsageError(
            f"{path} is not a run folder: it has no config.yaml", "name the --out of a training"
        )
    try:
        tree = LabelTree.from_dict(json.loads((path / "tree.json").read_text("utf-8")))
        store = dict(json.loads((path / "run.json").read_text("utf-8")))
        features = dict(store.pop("features", {}))
        precision = str(store.pop("precision", load_runtime(path / "config.yaml").precision))
        resolved = dict(store.pop("settings", {}))  # of 0.1.0, whose config.yaml names a preset
        store = {name: store[name] for name in ("dim", "encoder", "tiling")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"the run folder {path} is damaged: {error}", "train anew") from None
    folds, slides = read_splits(path / "splits.json")
    config = load_config(path / "config.yaml")
    if config.recipe.model != "flat":  # whose terms 0.1.0 wrote as `Recipe.loss_terms` has them
        own = {k: v for k, v in resolved.items() if hasattr(config.recipe, k)}
        config = replace(config, recipe=replace(config.recipe, **own))
    return Run(path, config, tree, folds, slides, store, features, precision)


def write_csv(to: Path | TextIO, rows: Iterable[Sequence[object]]) -> None:
    """Write rows as CSV; a file gets its name once it is whole.

    Raises:
        UsageError: The file cannot be written.
    """
    if isinstance(to, Path):
        text = StringIO()
        write_csv(text, rows)
        try:
            write_text(to, text.getvalue())
        except OSError as error:
            raise _cannot_write(to, error) from None
        return
    csv.writer(to, lineterminator="\n").writerows(rows)


def write_json(path: Path, value: object) -> None:
    """Write JSON under its final name in one step."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")
