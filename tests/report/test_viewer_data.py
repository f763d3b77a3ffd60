"""The slides' views: what the browser gets is what the model paid and what the slide shows."""

import base64
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from hmil_fast.bags.cache import FeatureCache
from hmil_fast.cli.main import main
from hmil_fast.errors import SlideError
from hmil_fast.evaluation.predict import slide_attention
from hmil_fast.io.store import StoreSpec, create_store
from hmil_fast.report.attention import slide_maps, top_tiles
from hmil_fast.report.canvas import cut_tiles, draw_on
from hmil_fast.report.colour_scale import LIMIT, colour_places, concentration, tile_values
from hmil_fast.report.html.data import view_file
from hmil_fast.report.viewer_data import MOST_CELLS, make_views, merged_cells, write_view
from hmil_fast.runs.run import open_run


def numbers(text: str, dtype: str) -> NDArray:
    return np.frombuffer(base64.b64decode(text), dtype)


@pytest.mark.slow
def test_a_view_holds_the_attention_of_the_prediction(
    run: Any, cohort: Any, tmp_path: Path
) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    opened, store = open_run(tmp_path / "run"), cohort.store
    bad = next(s for s in cohort.slides if store.status(s).any())
    for slide_id in ("s06", bad):
        prediction, attention = slide_attention(
            opened, FeatureCache(store, [slide_id], tmp_path), slide_id
        )
        write_view(opened, store, slide_id)
        view = json.loads(view_file(opened.path, slide_id).read_text())
        for shown, said in zip(view["probabilities"], prediction.probabilities, strict=True):
            np.testing.assert_allclose(shown, said, atol=1e-5)
        good = store.status(slide_id) == 0
        corners = numbers(view["cells"], "<u2").reshape(-1, 2) * view["unit"]
        np.testing.assert_allclose(corners, store.coords(slide_id), atol=view["unit"])
        assert [(m["level"], m["node"]) for m in view["maps"]] == list(opened.tree.nodes)
        for m in view["maps"]:
            paid = attention[-1][:, m["node"]]
            if m["level"] == 0:  # a sum of leaves: theirs, by their share of its probability
                two = slice(2 * m["node"], 2 * m["node"] + 2)
                share = prediction.probabilities[1][two] / prediction.probabilities[0][m["node"]]
                paid = attention[-1][:, two] @ share
            for scale, text in m["places"].items():
                places = numbers(text, "u1")
                assert (places[~good] == 255).all()
                want = colour_places(tile_values(paid, scale), scale)
                np.testing.assert_allclose(places[good] / 254, want, atol=0.51 / 254)
            times = np.clip(paid * good.sum(), 1 / LIMIT, LIMIT)
            shown = LIMIT ** (2 * (numbers(m["places"]["share"], "u1")[good] / 254) - 1)
            np.testing.assert_allclose(shown, times, rtol=0.01)
            assert m["spread"].startswith(f"top 10 % of tiles: {100 * concentration(paid):.3g} %")
            tiles = [tile for tile, *_ in m["top"]]
            best = np.flatnonzero(good)[np.argsort(-paid, kind="stable")[: len(tiles)]]
            assert tiles == best.tolist()
            assert [[x, y] for _, x, y, _ in m["top"]] == store.coords(slide_id)[best].tolist()
            np.testing.assert_allclose(
                [share for *_, share in m["top"]], np.sort(paid)[::-1][: len(tiles)], rtol=1e-3
            )


def test_slides_of_many_tiles_are_shown_in_larger_cells() -> None:
    side, columns = 100.0, 150
    coords = np.stack([np.arange(15_000) % columns, np.arange(15_000) // columns], 1) * 100 + 37
    weights = (coords[:, 0] + 1000.0 * (coords[:, 1] > 4000)).astype(np.float64)
    weights[0] = np.nan
    corners, cell_side, (painted,) = merged_cells(coords, side, [weights])
    assert cell_side == 200
    for scale, places in painted.items():
        assert len(corners) == len(places) <= MOST_CELLS
        values = tile_values(weights, scale)
        for i in (0, 7, len(corners) - 1):
            inside = ((coords >= corners[i]) & (coords < corners[i] + cell_side)).all(axis=1)
            assert inside.sum() == 4
            want = 254 * colour_places(np.nanmean(values[inside]), scale)
            assert places[i] == pytest.approx(float(want), abs=0.51)
    (nothing,) = merged_cells(coords[:3], side, [np.full(3, np.nan)])[2]
    assert all((places == 255).all() for places in nothing.values())


def test_the_highest_tiles_come_first_and_those_in_no_bag_never() -> None:
    weights = np.array([0.1, np.nan, 0.4, 0.1, 0.4])
    assert top_tiles(weights, 3).tolist() == [2, 4, 0]
    assert top_tiles(weights, 9).tolist() == [2, 4, 0, 3]
    assert top_tiles(np.full(2, np.nan), 3).tolist() == []


@pytest.mark.parametrize("model", ["abmil", "flat", "mean"])
def test_models_of_other_attention_are_shown(
    model: str, cohort: Any, train_small: Callable[..., Any], tmp_path: Path
) -> None:
    run = train_small(tmp_path / "run", model=model, epochs=1, folds=2)
    prediction, maps = slide_maps(run, cohort.store, "s06")
    wanted = {"abmil": [None], "mean": []}.get(model, [0, 1, 2, 3])
    assert [m.node for m in maps if m.level == 1] == wanted
    for m in maps:
        assert np.nansum(m.weights) == pytest.approx(1, abs=1e-4)
    write_view(run, cohort.store, "s06")
    assert main(["report", str(run.path)]) == 0
    assert 'class="look"' in (run.path / "report.html").read_text()
    assert sum(prediction.probabilities[-1]) == pytest.approx(1)


def test_tiles_are_cut_from_the_slide_where_they_were_encoded(
    slide_file: Callable[[str], Path], run: Any, cohort: Any, tmp_path: Path
) -> None:
    import openslide

    path = slide_file("CMU-1-Small-Region.svs")
    size = openslide.OpenSlide(path).dimensions
    store = create_store(tmp_path / "store", StoreSpec(4, "float16", {}, {}))
    attrs = {"read_px": 96, "level": 0, "tile_px_level0": 96.0, "level0_size": list(size)}
    coords = np.array([[480, 960], [96, 192], [480, 960]])
    for slide_id, change in (("a", {}), ("b", {"level0_size": [10, 10]})):
        with store.writer(slide_id, 3, attrs | change) as writer:
            writer.append(np.zeros((3, 4), np.float16))
            writer.commit(coords, np.zeros(3, np.uint8), {})
    cut = cut_tiles(path, store.record("a"), draw_on(store, "a"), [0, 1, 2])
    with openslide.OpenSlide(path) as slide:
        for pixels, corner in zip(cut, coords.tolist(), strict=True):
            want = np.asarray(slide.read_region(tuple(corner), 0, (96, 96)).convert("RGB"))
            assert np.abs(pixels.astype(int) - want).mean() < 2
    with pytest.raises(SlideError, match=r"'b' in the store has 10 × 10 px"):
        cut_tiles(path, store.record("b"), draw_on(store, "b"), [0])


@pytest.mark.slow
def test_commands_cut_tiles_from_the_slides_they_are_given(
    run: Any, cohort: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    store = create_store(tmp_path / "store", cohort.store.spec)
    coords, attrs = cohort.store.coords("s06"), cohort.store.record("s06").attrs
    with store.writer("s06", len(coords), attrs | {"read_px": 64, "level": 0}) as writer:
        writer.append(cohort.store.features("s06"))
        writer.commit(coords, cohort.store.status("s06"), {
            "thumbnail.jpg": cohort.store.file("s06", "thumbnail.jpg"),
        })  # fmt: skip
    width, height = attrs["level0_size"]
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    (tmp_path / "slides").mkdir()
    tifffile.imwrite(tmp_path / "slides" / "s06.tif", pixels, tile=(64, 64), photometric="rgb")
    slides, run_path = ["--slides", str(tmp_path / "slides")], str(tmp_path / "run")
    out = tmp_path / "x.png"
    command = ["heatmap", run_path, "s06", "--store", str(store.path), "--out", str(out)]
    assert main([*command, "--top-k", "3"]) == 2
    assert "Fix: give --slides the files" in capsys.readouterr().err
    assert not out.exists()
    assert main(command) == 0
    plain = Image.open(out).height
    assert main([*command, "--top-k", "3", *slides]) == 0
    assert Image.open(out).height > plain + 6 * 96

    report = ["report", run_path, "--store", str(store.path), "--allow-missing"]
    path = view_file(tmp_path / "run", "s06")
    assert main(report) == 0
    assert not json.loads(path.read_text())["cut"]
    assert main([*report, *slides]) == 0
    view = json.loads(path.read_text())
    assert view["cut"]
    tiles = {str(tile) for m in view["maps"] for tile, *_ in m["top"]}
    assert set(view["cuts"]) == tiles
    tile = next(iter(tiles))
    x, y = coords[int(tile)]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(view["cuts"][tile]))))
    want = pixels[y : y + 64, x : x + 64]
    assert np.corrcoef(shown.ravel(), want.ravel())[0, 1] > 0.5

    tifffile.imwrite(tmp_path / "slides" / "s06.tif", pixels[:128], tile=(64, 64))
    path.unlink()
    assert main([*report, *slides]) == 0
    assert "no tiles are cut" in capsys.readouterr().err
    assert not json.loads(path.read_text())["cuts"]


@pytest.mark.parametrize(
    "slide_id", ["切片" * 24, "切" * 200, "a/../b", "%2E.", "s 1 🔬", "." * 300, "x" * 254]
)
def test_a_slide_of_any_name_is_shown(run: Any, cohort: Any, tmp_path: Path, slide_id: str) -> None:
    """Also one whose percent-escaped name is longer than a file name may be."""
    shutil.copytree(run.path, tmp_path / "run")
    opened, old = open_run(tmp_path / "run"), cohort.store
    store = create_store(tmp_path / "store", old.spec)
    record = old.record("s06")
    with store.writer(slide_id, record.num_tiles, record.attrs) as writer:
        writer.append(old.features("s06"))
        jpeg = {"thumbnail.jpg": old.file("s06", "thumbnail.jpg") or b""}
        writer.commit(old.coords("s06"), old.status("s06"), jpeg)
    write_view(opened, store, slide_id)
    path = view_file(opened.path, slide_id)
    assert path.parent == opened.path / "views"
    assert json.loads(path.read_text())["slide_id"] == slide_id


def test_a_view_that_cannot_be_written_is_said_and_stops_no_other(
    run: Any, cohort: Any, tmp_path: Path
) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    opened = open_run(tmp_path / "run")
    (tmp_path / "run" / "views").mkdir(exist_ok=True)
    view_file(opened.path, "s06").mkdir()
    notes: list[str] = []
    make_views(opened, cohort.store, 100, say=notes.append)
    assert any("Is a directory" in note and note.endswith(": s06") for note in notes)
    assert view_file(opened.path, "s07").exists()
