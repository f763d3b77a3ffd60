"""Write what the report's viewer shows of a slide, one JSON file a slide in RUN/views.

It holds the thumbnail once, per cell and node one byte a colour scale, the top tiles of every
node, and their pixels where the slide's file is given. The browser paints the overlay.
"""

import base64
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hmil_fast.config import Runtime
from hmil_fast.errors import SlideError, StoreError, some
from hmil_fast.files import write_text
from hmil_fast.io.store import FeatureStore, SlideRecord
from hmil_fast.report.attention import NodeMap, likeliest_first, slide_maps, top_tiles
from hmil_fast.report.canvas import Canvas, cut_tiles, draw_on, why_not_drawn
from hmil_fast.report.colour_scale import LIMIT, SCALES, colour_places, spread, tile_values
from hmil_fast.report.drawing import paint
from hmil_fast.report.html.data import read_view, view_file
from hmil_fast.runs.predictions import Prediction, read_predictions
from hmil_fast.runs.run import Run
from hmil_fast.tables import Say, quiet

TOP_TILES = 6
MOST_CELLS = 6000  # a slide of more tiles is shown in larger cells
MOST_MAPS = 24
_CUT_NODES = 6  # likeliest nodes whose highest tiles are cut from the slide
_CUT_PX = 256
_SMALL = (240, 96)
_NO_PLACE = 255  # places among the colours are 0..254
_SHARP = 0.75  # a thumbnail this close to the tiles' own resolution needs no cut tiles


# shows the progress of a loop over slides, of which so many are worked on
Track = Callable[[Sequence[str], int], Iterable[str]]


def untracked(slide_ids: Sequence[str], count: int) -> Iterable[str]:
    """Show no progress."""
    return slide_ids


def make_views(
    run: Run,
    store: FeatureStore,
    most: int,
    slides: Mapping[str, Path] | None = None,
    runtime: Runtime = Runtime(),
    say: Say = quiet,
    track: Track = untracked,
) -> None:
    """Make the views that the report lacks, at most `most`; report what cannot be shown.

    Args:
        run: A trained run.
        store: Holds the slides' features and thumbnails.
        most: Views to make.
        slides: Files by slide id, to cut the tiles of the highest attention from.
        runtime: Device and precision.
        say: Called with what cannot be shown, and what was guessed.
        track: Shows the progress of a loop over slides.

    Raises:
        UsageError: The store is of another kind than the run's.
    """
    store = run.at_run_scales(store)
    slides = slides or {}
    predictions: dict[str, list[Prediction]] = {}
    for p in read_predictions(run.path / "predictions.csv", run.tree):
        predictions.setdefault(p.slide_id, []).append(p)
    missing, notes = [], dict[str, list[str]]()
    for slide_id, of_folds in predictions.items():
        try:
            lacks = why_not_drawn(store.record(slide_id))
            why = None if lacks is None else f"not shown, with {lacks}"
        except StoreError as error:
            why = f"not shown: {error.what}"
        if why is not None:
            notes.setdefault(why, []).append(slide_id)
            continue
        levels = zip(*(p.probabilities for p in of_folds), strict=True)
        view = read_view(view_file(run.path, slide_id), [np.mean(p, axis=0) for p in levels])
        if view is None or (slide_id in slides and not view["cut"]):
            missing.append(slide_id)
    made = 0
    for slide_id in track(missing, min(most, len(missing))):
        if made == most:
            break
        try:
            of_view = write_view(run, store, slide_id, slides.get(slide_id), runtime)
        except (StoreError, OSError) as error:
            why = error.what if isinstance(error, StoreError) else str(error)
            notes.setdefault(f"not shown: {why}", []).append(slide_id)
            continue
        for note in of_view:
            notes.setdefault(note, []).append(slide_id)
        made += 1
    for note, of in notes.items():
        say(f"{note}: {some(of)}" + (f" ({len(of)} slides)" if len(of) > 5 else ""))


def write_view(
    run: Run,
    store: FeatureStore,
    slide_id: str,
    slide: Path | None = None,
    runtime: Runtime = Runtime(),
) -> tuple[str, ...]:
    """Predict a slide and write down what the viewer shows of that very forward.

    Args:
        run: A trained run.
        store: Holds the slide's features.
        slide_id: The slide.
        slide: The slide's file, to cut the highest tiles from at their own resolution; else they
            are cut from the thumbnail. It is drawn on where the store has no thumbnail.
        runtime: Device and precision.

    Returns:
        What was guessed to draw it.

    Raises:
        StoreError: The slide is not in the store, or has no tiles or no coordinates.
    """
    record = store.record(slide_id)
    notes: list[str] = []
    try:
        canvas = draw_on(store, slide_id, slide)
    except SlideError as error:
        notes.append(f"the slide's file is not used: {error.what}")
        slide, canvas = None, draw_on(store, slide_id)
    prediction, maps = slide_maps(run, store, slide_id, runtime)
    likely = likeliest_first(run.tree, prediction, maps)
    maps, likely = _first(maps, likely, MOST_MAPS)
    coords = canvas.coords
    tops = [top_tiles(m.weights, TOP_TILES) for m in maps]
    cuts: dict[int, str] = {}
    sharp = thumbnail_is_sharp(canvas, record)
    if slide is not None and not sharp:
        wanted = sorted({int(tile) for i in likely[:_CUT_NODES] for tile in tops[i]})
        try:
            pixels = cut_tiles(slide, record, canvas, wanted)
            cuts = {
                tile: _webp(Image.fromarray(cut), (_CUT_PX, _CUT_PX), 70)
                for tile, cut in zip(wanted, pixels, strict=True)
            }
        except SlideError as error:
            notes.append(f"no tiles are cut: {error.what}")
    cells, cell_side, places = merged_cells(coords, canvas.side, [m.weights for m in maps])
    unit = max(1.0, max(canvas.size) / 65535)
    view = {
        "slide_id": slide_id,
        "probabilities": [
            [round(float(v), 5) for v in level] for level in prediction.probabilities
        ],
        "size": list(canvas.size),
        "mpp": canvas.mpp,
        "side": canvas.side,
        "tiles": record.num_tiles,
        "picture": _webp(Image.fromarray(canvas.picture), canvas.picture.shape[1::-1], 40),
        "small": _webp(
            Image.fromarray(_best_painted(canvas, [maps[i] for i in likely])), _SMALL, 70
        ),
        "limit": LIMIT,
        "unit": unit,
        "cells": _base64(np.rint(np.maximum(cells, 0) / unit).astype("<u2")),
        "cell_side": cell_side,
        "cut": bool(cuts) or sharp or (canvas.real and not maps),
        "cuts": {str(tile): cut for tile, cut in cuts.items()},
        "maps": [
            {
                "level": m.level,
                "node": m.node,
                "spread": spread(m.weights),
                "places": {scale: _base64(of_map[scale]) for scale in SCALES},
                "top": [[int(t), *coords[t].tolist(), float(f"{m.weights[t]:.4g}")] for t in top],
            }
            for m, of_map, top in zip(maps, places, tops, strict=True)
        ],
    }
    path = view_file(run.path, slide_id)
    path.parent.mkdir(exist_ok=True)
    write_text(path, json.dumps(view, separators=(",", ":"), allow_nan=False))
    return (*notes, *canvas.notes)


def thumbnail_is_sharp(canvas: Canvas, record: SlideRecord) -> bool:
    """Whether a tile on the thumbnail is about as sharp as it was when it was encoded."""
    sharp = canvas.side / canvas.downsample >= _SHARP * record.attrs.get("read_px", np.inf)
    return canvas.real and bool(sharp)


def _first(maps: list[NodeMap], likely: list[int], most: int) -> tuple[list[NodeMap], list[int]]:
    """The likeliest maps in the tree's order, and their places by likelihood."""
    kept = sorted(likely[:most])
    return [maps[i] for i in kept], [kept.index(i) for i in likely[:most]]


def _best_painted(canvas: Canvas, likely: list[NodeMap]) -> NDArray[np.uint8]:
    """The picture under the attention of the leaf that the run answers."""
    if not likely:
        return canvas.picture
    return paint(canvas.picture, canvas.coords, canvas.side, likely[0].weights, canvas.downsample)


def merged_cells(
    coords: NDArray[np.int64], side: float, weights: list[NDArray[np.float64]]
) -> tuple[NDArray[np.int64], float, list[dict[str, NDArray[np.uint8]]]]:
    """Merge tiles into square cells, at most MOST_CELLS; average the attention of each cell.

    Returns:
        Corners in level-0 px, int64 [n, 2]; the side in level-0 px; and per map and scale
        uint8 [n]: the colour, 0..254 of the colour map, or 255 where no tile has attention.
    """
    corners, inverse = coords, np.arange(len(coords))
    times = 1
    while len(corners) > MOST_CELLS:
        times += 1
        origin = coords.min(axis=0)
        places, inverse = np.unique(
            np.floor((coords - origin) / (side * times)), axis=0, return_inverse=True
        )
        inverse = inverse.reshape(-1)
        corners = np.rint(origin + places * side * times).astype(np.int64)
    per_map = []
    for of_map in weights:
        known = np.isfinite(of_map)
        count = np.bincount(inverse[known], minlength=len(corners))
        painted = {}
        for scale in SCALES:
            values = tile_values(of_map, scale)[known]
            mean = np.bincount(inverse[known], values, len(corners)) / np.maximum(count, 1)
            place = np.rint(254 * colour_places(mean, scale))
            painted[scale] = np.where(count > 0, place, _NO_PLACE).astype(np.uint8)
        per_map.append(painted)
    return corners, side * times, per_map


def _webp(picture: Image.Image, most: tuple[int, ...], quality: int) -> str:
    picture = picture.copy()
    picture.thumbnail((most[0], most[1]), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, format="WEBP", quality=quality, method=4)
    return base64.b64encode(file.getvalue()).decode()


def _base64(values: NDArray[Any]) -> str:
    return base64.b64encode(values.tobytes()).decode()
