"""What is asked of folds before anything is trained, and manifests taken as they are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hmil_fast.bags.cache import FeatureCache
from hmil_fast.bags.fold import Fold
from hmil_fast.bags.labelled import with_features
from hmil_fast.bags.manifest import read_manifest, sources, versions, write_splits
from hmil_fast.bags.splits import Slide, make_folds, read_labels
from hmil_fast.cli.main import main
from hmil_fast.config import TrainConfig
from hmil_fast.errors import UsageError
from hmil_fast.io.store import FeatureStore, create_store
from hmil_fast.labels import LabelTree
from hmil_fast.metrics import all_levels
from hmil_fast.runs.predictions import read_predictions, stack_heads, stack_leaves
from hmil_fast.runs.run import open_run
from hmil_fast.training.choose_folds import choose_folds, warn_of_near_duplicates

TREE = LabelTree.from_nested({"benign": ["N", "PB"], "malignant": ["DCIS", "IC"]})
CONFIG = TrainConfig(folds=2, val_fraction=0.25)


@pytest.fixture(scope="module")
def store(
    cohort: Any, fill: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> FeatureStore:
    made = create_store(tmp_path_factory.mktemp("folds") / "store", cohort.store.spec)
    fill(made, {f"s{i}": (i % 4, 8) for i in range(24)})
    return made


def slides(n: int = 24) -> list[Slide]:
    return [Slide(f"s{i}", TREE.leaves[i % 4], f"P{i}") for i in range(n)]


def manifest(path: Path, folds: list[Fold], known: list[Slide], **made_from: str) -> Path:
    write_splits(path, folds, known, made_from)
    return path


def test_a_manifest_is_used_as_it_is(store: FeatureStore, tmp_path: Path) -> None:
    folds = make_folds(slides(20), 3, 7, 0.3)
    now = sources(TREE, slides(20), store)
    path = manifest(tmp_path / "splits.json", folds, slides(20), **now)
    said: list[str] = []
    got, chosen = choose_folds(store, slides(), TREE, CONFIG, path, said.append)
    assert (got, chosen) == (folds, slides(20))
    assert said == [
        f"4 labelled slides are in no fold of {path}: s20, s21, s22, s23",
        "20 of 20 slides are tested",
        "folds=2 is not used: the splits have 3",
    ]


def test_what_differs_from_the_manifest_is_said(store: FeatureStore, tmp_path: Path) -> None:
    other = [Slide("s0", "PB", "P0"), *slides()[1:]]
    folds = make_folds(slides(), 2, 0, 0.25)
    path = manifest(tmp_path / "splits.json", folds, other, tree="0", features="1")
    said: list[str] = []
    choose_folds(store, slides(), TREE, CONFIG, path, said.append)
    assert f"1 slides have another label than in {path}: s0" in said
    assert any("made with another tree, features" in line for line in said)


def test_an_imported_manifest_gets_labels_patients_and_a_validation_part(
    store: FeatureStore, tmp_path: Path
) -> None:
    train, test = [f"s{i}" for i in range(16)], [f"s{i}" for i in range(16, 24)]
    bare = [Slide(s, "", "") for s in (*train, *test)]
    again = Fold((*test, *train[4:8]), (), tuple(train[:4]))
    path = manifest(tmp_path / "a.json", [Fold(tuple(train), (), tuple(test)), again], bare)
    said: list[str] = []
    got, chosen = choose_folds(store, slides(), TREE, CONFIG, path, said.append)
    assert chosen == slides()
    for fold, asked in zip(got, (train, again.train), strict=True):
        assert fold.val
        assert set(fold.train) | set(fold.val) == set(asked)
    assert sum("no validation part" in line for line in said) == 2
    assert "12 of 24 slides are tested" in said

    same = [Slide(s.slide_id, s.label, "one" if i in (0, 20) else s.patient_id)
            for i, s in enumerate(slides())]  # fmt: skip
    with pytest.raises(UsageError, match="fold 0 has patient 'one' in train and in test"):
        choose_folds(store, same, TREE, CONFIG, path, said.append)
    with pytest.raises(
        UsageError, match=r"4 of 24 slides of .* lack a label or features: s20, s21"
    ):
        choose_folds(store, slides(20), TREE, CONFIG, path, said.append)


def test_a_manifest_may_name_slides_otherwise_or_patients(
    store: FeatureStore, tmp_path: Path
) -> None:
    ids = [f"s{i}" for i in range(24)]
    fold = Fold(tuple(ids[:12]), tuple(ids[12:16]), tuple(ids[16:]))
    written = Fold(
        *(tuple(f"/d/{i}.svs" for i in part) for part in (fold.train, fold.val, fold.test))
    )
    bare = [Slide(i, "", "") for part in (written.train, written.val, written.test) for i in part]
    said: list[str] = []
    path = manifest(tmp_path / "a.json", [written], bare)
    assert choose_folds(store, slides(), TREE, CONFIG, path, said.append)[0] == [fold]
    assert said[0].startswith(f"24 slides of {path} have another name in the labels: '/d/s0.svs'")

    two = [Slide(s.slide_id, s.label, f"P{i // 2}") for i, s in enumerate(slides())]
    cases = Fold(tuple(f"p{i}" for i in range(6)), ("P6", "s14", "s15"), ("P8", "P9", "P10", "P11"))
    path = manifest(
        tmp_path / "b.json",
        [cases],
        [Slide(i, "", "") for i in cases.train + cases.val + cases.test],
    )
    said.clear()
    assert choose_folds(store, two, TREE, CONFIG, path, said.append)[0] == [fold]
    assert said[0].startswith(f"11 names in {path} are patients of the labels, each stands for all")


def test_a_validation_part_that_cannot_choose_an_epoch_is_named(
    store: FeatureStore, tmp_path: Path
) -> None:
    ids = [f"s{i}" for i in range(24)]
    one = Fold(tuple(ids[:15]), ("s15",), tuple(ids[16:]))
    alike = Fold(tuple(ids[:15]), ("s16", "s20"), (*ids[15:16], *ids[17:20], *ids[21:]))
    good = Fold(tuple(ids[:14]), ("s14", "s15"), tuple(ids[16:]))
    said: list[str] = []
    path = manifest(tmp_path / "s.json", [one, alike, good], slides())
    choose_folds(store, slides(), TREE, CONFIG, path, said.append)
    wanted = (
        "2 of 3 validation parts are too small to choose an epoch by (fold 0: one slide (s15), "
    )
    assert sum(line.startswith(wanted + "fold 1: 2 slides, all 'N')") for line in said) == 1


@pytest.mark.parametrize("name", ["svs.csv", "svs_some.csv"])
def test_labels_with_suffixes_reach_every_slide(
    name: str, cohort: Any, fill: Callable[..., None], tmp_path: Path
) -> None:
    tables = Path(__file__).parent.parent / "data" / "tables"
    tree = LabelTree.from_nested({"benign": ["n", "b"], "malignant": ["m"]})
    made = create_store(tmp_path / "store", cohort.store.spec)
    fill(made, {f"s{i:03d}": (i % 3, 1) for i in range(62)})
    said: list[str] = []
    found = with_features(made, read_labels(tables / name, tree), said.append)
    assert found == read_labels(tables / "semicolon.csv", tree)
    assert "slides have another name in the store: 's00" in said[0]
    assert said[1] == "2 slides of the store have no label here: s060, s061"


def test_a_run_keeps_the_folds_it_was_set_up_with(
    cohort: Any,
    settings: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    command = ["train", *cohort.arguments, "--out", str(out), *settings]
    command += ["epochs=1", "baseline=none", "folds=2", "model=mean"]
    assert main(command) == 0
    made = read_manifest(out / "splits.json")
    assert made.made_with == versions()
    assert made.made_with.keys() == {"scikit-learn", "numpy", "hmil-fast"}
    # as another scikit-learn would have split, of a run that was stopped
    other = make_folds(made.slides, 2, 99, 0.2)
    write_splits(
        out / "splits.json",
        other,
        made.slides,
        made.made_from,
        versions() | {"scikit-learn": "1.7"},
    )
    for name in ("predictions.csv", "fold-0", "fold-1"):
        (out / name).rename(tmp_path / name)
    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr().err
    now = versions()["scikit-learn"]
    assert f"the folds of {out} were made with scikit-learn 1.7 (now {now}); they are kept" in said
    kept = read_manifest(out / "splits.json")
    assert (kept.folds, kept.made_with["scikit-learn"]) == (other, "1.7")
    tested = {
        p.slide_id: p.fold for p in read_predictions(out / "predictions.csv", open_run(out).tree)
    }
    assert tested == {slide_id: k for k, fold in enumerate(other) for slide_id in fold.test}
    assert main([*command, "seed=7"]) == 2
    assert "set up with other settings (seed is 7, was" in capsys.readouterr().err


def test_a_validation_part_that_was_cut_out_is_kept(store: FeatureStore, tmp_path: Path) -> None:
    ids = [f"s{i}" for i in range(24)]
    given = Fold(tuple(ids[:16]), (), tuple(ids[16:]))
    path = manifest(tmp_path / "given.json", [given], slides())
    once = Fold((*ids[:3], *ids[4:16]), ("s3",), given.test)
    folder = tmp_path / "run"
    folder.mkdir()
    manifest(folder / "splits.json", [once], slides())
    arguments = (store, slides(), TREE, CONFIG, path, lambda line: None, folder)
    assert choose_folds(*arguments)[0] != [once]  # the folder is not set up
    (folder / "config.yaml").touch()
    assert choose_folds(*arguments)[0] == [once]
    manifest(folder / "splits.json", [Fold(once.train[1:], once.val, given.test)], slides())
    (fold,) = choose_folds(*arguments)[0]  # of another training part: not those of the manifest
    assert {*fold.train, *fold.val} == set(given.train)


def test_slides_tested_in_several_folds_are_counted(store: FeatureStore, tmp_path: Path) -> None:
    ids = [f"s{i}" for i in range(24)]
    folds = [Fold(tuple(ids[:12]), tuple(ids[12:16]), tuple(ids[16:])) for _ in range(2)]
    path = manifest(tmp_path / "splits.json", folds, slides())
    said: list[str] = []
    choose_folds(store, slides(), TREE, CONFIG, path, said.append)
    assert said[0].startswith("8 of 24 slides are tested, 8 of them in several folds")


def test_a_leaf_without_slides_to_train_on_is_named_with_counts(
    store: FeatureStore, tmp_path: Path
) -> None:
    ids = np.array([f"s{i}" for i in range(24)])
    of_ic = np.arange(24) % 4 == 3
    rest, rare = ids[~of_ic], ids[of_ic]
    lacking = Fold(tuple(rest[:10]), tuple(rest[10:14]), (*rest[14:], *rare))
    good = Fold((*rest[:10], *rare[:3]), tuple(rest[10:]), tuple(rare[3:]))
    said: list[str] = []
    path = manifest(tmp_path / "some.json", [good, lacking], slides())
    choose_folds(store, slides(), TREE, CONFIG, path, said.append)
    wanted = "leaf 'IC' has no slide to train on in 1 folds: fold 1: train 0, val 0, test 6"
    assert wanted in said
    path = manifest(tmp_path / "all.json", [lacking], slides())
    with pytest.raises(UsageError, match=r"of leaf 'IC' \(fold 0: train 0, val 0, test 6\)"):
        choose_folds(store, slides(), TREE, CONFIG, path, said.append)
    unlabelled = [s for s in slides() if s.label != "PB"]
    with pytest.raises(UsageError, match="no fold has a slide to train on of leaf 'PB'") as error:
        choose_folds(store, unlabelled, TREE, CONFIG, None, said.append)
    assert "take the leaf out of the tree" in error.value.fix


@pytest.mark.parametrize("largest", [1, 3000])  # a column that would decide alone
def test_copies_in_two_parts_are_refused_and_near_copies_named(
    cohort: Any, tmp_path: Path, largest: int
) -> None:
    store = create_store(tmp_path / "store", cohort.store.spec)
    rng = np.random.default_rng(0)
    sizes = np.array([largest, *[1] * 15])
    bags = {f"s{i}": (rng.normal(size=(40, 16)) * sizes).astype(np.float16) for i in range(24)}
    bags["s20"] = bags["s0"]
    bags["s21"] = bags["s1"][rng.permutation(40)]
    for slide_id, x in bags.items():
        attrs = {"tile_px_level0": 64.0, "level0_size": [640, 640], "mpp": {"level0": 0.5}}
        with store.writer(slide_id, 40, attrs) as writer:
            writer.append(x)
            writer.commit(np.zeros((40, 2), np.int64), np.zeros(40, np.uint8))
    ids = list(bags)
    fold = Fold(tuple(ids[:16]), tuple(ids[16:20]), tuple(ids[20:]))
    path = manifest(tmp_path / "splits.json", [fold], slides())
    with pytest.raises(UsageError, match=r"very same features .*s0 \(train\) and s20 \(test\)"):
        choose_folds(store, slides(), TREE, CONFIG, path, print)
    said: list[str] = []
    warn_of_near_duplicates(
        [fold], FeatureCache(store, ids[1:20] + ids[21:], tmp_path), said.append
    )
    assert len(said) == 1
    assert said[0].startswith("1 pairs of slides")
    assert "s1 (train) and s21 (test) in fold 0" in said[0]
    warn_of_near_duplicates([fold], FeatureCache(store, ids, tmp_path, "stream"), said.append)
    assert "are not looked for" in said[1]


def test_training_takes_the_folds_of_another_run_and_answers_with_sums(
    run: Any,
    cohort: Any,
    settings: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    command = ["train", *cohort.arguments, "--out", str(out), *settings]
    changes = ["epochs=2", "baseline=none", "seed=5", "folds=2", "coarse=sum"]
    assert main([*command, *changes, "--splits", str(run.path / "splits.json")]) == 0
    said = capsys.readouterr()
    assert "36 of 36 slides are tested" in said.err
    assert "coarse sensitivity (malignant)" in said.out
    assert read_manifest(out / "splits.json") == read_manifest(run.path / "splits.json")
    assert read_manifest(out / "splits.json").made_from.keys() == {
        "labels", "tree", "slides", "store", "features",
    }  # fmt: skip
    opened = open_run(out)
    for name in ("fold-2/predictions.csv", "fold-2/val_predictions.csv"):
        predictions = read_predictions(out / name, opened.tree)
        coarse = all_levels(opened.tree, stack_leaves(predictions, opened.tree))[0]
        assert np.abs(stack_heads(predictions)[0] - coarse).max() > 1e-3
    assert main(["compare", str(run.path), str(out), "--resamples", "50"]) == 0
    assert "36 slides of 30 patients" in capsys.readouterr().out
