"""What a job will need, from a sample of its slides, and a disk that is too small for it."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hmil_fast.cli.main import main
from hmil_fast.extraction.preflight import SAMPLE, estimate, look, preflight, sample
from hmil_fast.extraction.slides import SlideTask
from hmil_fast.io.tiles.grid import TileSpec

SlideFile = Callable[[str], Path]

pytestmark = pytest.mark.usefixtures("own_signals")


def files(folder: Path, sizes: dict[str, int]) -> list[SlideTask]:
    tasks = []
    for name, size in sizes.items():
        path = folder / name
        with path.open("wb") as file:
            file.truncate(size)
        tasks.append(SlideTask(path.stem, path))
    return tasks


def test_the_sample_spans_small_and_large(tmp_path: Path) -> None:
    tasks = files(tmp_path, {f"{n}.svs": 1000 * n for n in range(1, 161)})
    chosen = [int(task.slide_id) for task in sample(tasks[::-1])]
    assert chosen == list(range(6, 160, 10))
    assert len(sample(tasks[:5])) == 5


def test_tiles_go_by_bytes_for_each_kind_of_file(tmp_path: Path) -> None:
    tasks = files(
        tmp_path,
        {"a.svs": 100, "b.svs": 300, "c.tif": 1000, "d.tif": 500, "e.mrxs": 1, "f.mrxs": 9},
    )
    found = estimate(tasks, {"a": 10, "c": 20, "e": 7}, 100, 0.5)
    assert found.tiles == 10 + 30 + 20 + 10 + 7 + 7
    assert (found.slides, found.sampled, found.unusable) == (6, 3, 0)
    assert found.seconds == found.tiles / 2
    assert found.bytes > 100 * found.tiles
    found = estimate(tasks, {"a": 10, "b": None}, 100, None)  # an unusable one has no tiles
    assert found.tiles == 10 + 38  # of the other kinds nothing is known: as many a byte
    assert found.unusable == 1


@pytest.mark.slow
def test_the_estimate_is_near_the_truth(
    slide_file: SlideFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hmil_fast.extraction.preflight.LOOK_SECONDS", 100.0)
    for name in ("CMU-1-Small-Region.svs", "cmu1_small_pyramid.tif"):
        for number in range(10):
            (tmp_path / f"{number}-{name}").symlink_to(slide_file(name))
    (tmp_path / "bad.svs").write_text("no slide")
    tasks = [SlideTask(path.stem, path) for path in sorted(tmp_path.iterdir())]
    spec = TileSpec(256, 1.0, 0.25, False)
    truth = look(tasks, spec)
    assert len(truth) == len(tasks)
    assert truth["bad"] is None
    expected = estimate(tasks, look(sample(tasks), spec), 1, None)
    assert expected.tiles == pytest.approx(sum(n or 0 for n in truth.values()), rel=0.2)
    assert expected.unusable == 1
    text = preflight(tasks, (), spec, (1280, "float16"), None, tmp_path / "store")
    assert text is not None
    assert f"for 21 slides, by {SAMPLE} of them, of which 1 cannot be used" in text
    assert text.endswith("GB free")
    few = [task.slide_id for task in tasks[:10]]  # of what is left nobody needs to be told
    assert preflight(tasks, few, spec, (1280, "float16"), None, tmp_path / "store") is None


@pytest.mark.slow
def test_a_disk_too_small_is_refused_before_any_work(
    slide_file: SlideFile,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hmil_fast.extraction.preflight.LOOK_SECONDS", 100.0)
    free = os.statvfs(tmp_path)
    slide = slide_file("CMU-1-Small-Region.svs")
    rows = max(100, round(free.f_bavail * free.f_frsize / 1e8))
    lines = ["path,slide_id", *(f"{slide},s{number}" for number in range(rows))]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    store = tmp_path / "store"
    args = ["--manifest", str(tmp_path / "list.csv"), "--tile-size", "32", "--views", "15"]
    args += ["--store", str(store), "--encoder", "efficientnet-lite0"]
    assert main(["extract", *args]) == 2
    what, fix = capsys.readouterr().err.strip().splitlines()
    assert f"for {rows:,} slides" in what
    assert f"the disk of {store} has" in what
    assert fix.endswith("or --no-preflight to start anyway")
    assert not store.exists()
    assert main(["doctor", *args, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert len(found["slides"]) == SAMPLE
    (bad,) = (finding for finding in found["machine"] if finding["state"] == "bad")
    assert "the job needs about" in bad["what"]
