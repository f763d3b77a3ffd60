"""A PNG of the attention per node of the label tree over the thumbnail, and the top tiles."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hmil_fast.errors import UsageError
from hmil_fast.io.store import FeatureStore
from hmil_fast.labels import LabelTree
from hmil_fast.training.attention import (
    NodeMap,
    cut_tiles,
    node_name,
    read_thumbnail,
    slide_maps,
    top_tiles,
)
from hmil_fast.training.pictures import Node, heatmap_sheet
from hmil_fast.training.run_folder import Prediction, Run
from hmil_fast.training.tile_sheet import TileRow, stacked, tile_sheet

MOST_PANELS = 11


def draw_heatmap(
    run: Run,
    store: FeatureStore,
    slide_id: str,
    out: Path,
    nodes: Sequence[str] = (),
    tiles: tuple[Path, int] | None = None,
) -> Prediction:
    """Draw the attention of the very forward that makes the slide's prediction; write a PNG.

    Args:
        run: A trained run of a model with attention.
        store: Holds the slide's features and its thumbnail.
        slide_id: The slide.
        out: The PNG.
        nodes: Names of tree nodes to draw; by default all of a small tree, else the likeliest.
        tiles: The slide's file and how many of its tiles to draw per node, the highest first.

    Raises:
        UsageError: No such node, the model has no attention, or the PNG cannot be written.
        StoreError: The slide is not in the store, or has no tiles.
        SlideError: The slide's file is another one, or cannot be opened.
    """
    if out.suffix.lower() != ".png":
        raise UsageError(f"the picture {out} would be a PNG", "end its name in .png")
    store = run.fitting(store)
    record = store.record(slide_id)
    thumbnail = read_thumbnail(store, record)
    prediction, maps = slide_maps(run, store, slide_id)
    if not maps:
        raise UsageError(
            f"the model {run.config.model!r} of {run.path} has no attention to draw",
            "use a run of a model that has, hmil for instance",
        )
    chosen = _chosen(run.tree, prediction, maps, nodes)
    panels = [_panel(run.tree, prediction, m) for m in chosen]
    coords, attrs = store.coords(slide_id).astype(np.int64), record.attrs
    picture = heatmap_sheet(
        thumbnail,
        coords,
        attrs["tile_px_level0"],
        panels,
        downsample=attrs["level0_size"][0] / thumbnail.shape[1],
        mpp=attrs["mpp"]["level0"],
        title=slide_id,
    )
    if tiles is not None:
        slide, k = tiles
        rows = []
        for m, panel in zip(chosen, panels, strict=True):
            top = top_tiles(m.weights, k)
            pixels = cut_tiles(slide, record, coords[top])
            rows.append(TileRow(panel.title, pixels, m.weights[top], coords[top]))
        picture = stacked(picture, tile_sheet(rows, picture.width))
    partial = out.with_name(f"{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        picture.save(partial, "PNG")
        partial.replace(out)
    except OSError as error:
        raise UsageError(
            f"cannot write {out}: {error.strerror}", "name a place you can write to"
        ) from None
    return prediction


def _chosen(
    tree: LabelTree, prediction: Prediction, maps: Sequence[NodeMap], names: Sequence[str]
) -> list[NodeMap]:
    for name in names:
        if not any(name in level for level in tree.names):
            every = sorted({n for level in tree.names for n in level})
            raise UsageError(f"no node is called {name!r}", f"name some of {', '.join(every)}")
    if names:
        # a map that all nodes of a level share is also that of the node asked for
        return [m for m in maps if m.node is None or tree.names[m.level][m.node] in names]

    def probability(number: int) -> float:
        m = maps[number]
        return 1.0 if m.node is None else float(prediction.probabilities[m.level][m.node])

    likely = sorted(range(len(maps)), key=lambda number: -probability(number))
    return [maps[number] for number in sorted(likely[:MOST_PANELS])]


def _panel(tree: LabelTree, prediction: Prediction, m: NodeMap) -> Node:
    """The map with its title; the nodes of the prediction are marked."""
    title, path = node_name(tree, m.level, m.node), False
    if m.node is not None:
        p = prediction.probabilities[m.level]
        title, path = f"{title} · {p[m.node]:.2f}", int(p.argmax()) == m.node
    return Node(title, m.weights, path)
