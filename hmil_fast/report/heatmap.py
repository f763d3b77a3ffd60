"""Write a PNG of a slide: its attention per node of the label tree, and its top tiles."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hmil_fast.config import Runtime
from hmil_fast.errors import UsageError
from hmil_fast.files import write_file
from hmil_fast.io.store import FeatureStore
from hmil_fast.labels import LabelTree
from hmil_fast.report.attention import NodeMap, answer_nodes, likeliest_first, slide_maps, top_tiles
from hmil_fast.report.canvas import cut_tiles, draw_on
from hmil_fast.report.drawing import Node, heatmap_sheet
from hmil_fast.report.tile_sheet import TileRow, stacked, tile_sheet
from hmil_fast.runs.predictions import Prediction
from hmil_fast.runs.run import Run

MOST_PANELS = 11


@dataclass(frozen=True)
class HeatmapOptions:
    """What a heatmap shows.

    Attributes:
        nodes: Names of tree nodes to draw; by default all of a small tree, else the likeliest.
        top_k: Number of tiles to draw per node, those of the highest attention; they are cut from
            the slide's file.
        scale: Meaning of the colours, one of `hmil_fast.report.colour_scale.SCALES`.
    """

    nodes: Sequence[str] = ()
    top_k: int | None = None
    scale: str = "share"


def draw_heatmap(
    run: Run,
    store: FeatureStore,
    slide_id: str,
    out: Path,
    slide: Path | None = None,
    options: HeatmapOptions = HeatmapOptions(),
    runtime: Runtime = Runtime(),
) -> tuple[Prediction, tuple[str, ...]]:
    """Draw the attention of the very forward that makes the slide's prediction; write a PNG.

    Args:
        run: A trained run of a model with attention.
        store: Holds the slide's features.
        slide_id: The slide.
        out: The PNG.
        slide: The slide's file, for tiles, and for the thumbnail where the store has none.
        options: Nodes, tiles and colours.
        runtime: Device and precision.

    Returns:
        The prediction, and what was guessed to draw it.

    Raises:
        UsageError: No such node, the model has no attention, or the PNG cannot be written.
        StoreError: The slide is not in the store, or has no tiles or no coordinates.
        SlideError: The slide's file is another one, or cannot be opened.
    """
    if out.suffix.lower() != ".png":
        raise UsageError(f"the picture {out} would be a PNG", "end its name in .png")
    store = run.at_run_scales(store)
    canvas = draw_on(store, slide_id, slide)
    prediction, maps = slide_maps(run, store, slide_id, runtime)
    if not maps:
        raise UsageError(
            f"the model {run.config.recipe.model!r} of {run.path} has no attention to draw",
            "use a run of a model that has, hmil for instance",
        )
    chosen = _chosen(run.tree, prediction, maps, options.nodes)
    panels = [_panel(run.tree, prediction, m) for m in chosen]
    picture = heatmap_sheet(
        canvas.picture,
        canvas.coords,
        canvas.side,
        panels,
        downsample=canvas.downsample,
        mpp=canvas.mpp,
        title=slide_id,
        scale=options.scale,
    )
    if slide is not None and options.top_k is not None:
        record, rows = store.record(slide_id), []
        for m, panel in zip(chosen, panels, strict=True):
            top = top_tiles(m.weights, options.top_k)
            pixels = cut_tiles(slide, record, canvas, top)
            rows.append(TileRow(panel.title, pixels, m.weights[top], canvas.coords[top]))
        picture = stacked(picture, tile_sheet(rows, picture.width))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, lambda partial: picture.save(partial, "PNG"))
    except OSError as error:
        raise UsageError(
            f"cannot write {out}: {error.strerror}", "name a place you can write to"
        ) from None
    return prediction, canvas.notes


def _chosen(
    tree: LabelTree, prediction: Prediction, maps: Sequence[NodeMap], names: Sequence[str]
) -> list[NodeMap]:
    for name in names:
        if not any(name in level for level in tree.names):
            every = sorted({n for level in tree.names for n in level})
            raise UsageError(f"no node is called {name!r}", f"name some of {', '.join(every)}")
    if names:
        wanted = {
            tree.node(level, k)
            for level, nodes in enumerate(tree.names)
            for k, node in enumerate(nodes)
            if node in names
        }
        # a map that all nodes share is also that of a wanted node
        return [m for m in maps if m.node is None or (m.level, m.node) in wanted]
    likely = likeliest_first(tree, prediction, maps)
    return [maps[place] for place in sorted(likely[:MOST_PANELS])]


def _panel(tree: LabelTree, prediction: Prediction, m: NodeMap) -> Node:
    """The map with its title; the nodes of the prediction are marked."""
    if m.node is None:
        return Node("attention", m.weights)
    title = f"{tree.title(m.level, m.node)} · {prediction.probabilities[m.level][m.node]:.2f}"
    return Node(title, m.weights, (m.level, m.node) in answer_nodes(tree, prediction))
