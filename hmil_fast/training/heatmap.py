"""Attention per node of the label tree, over the slide's thumbnail."""

import io
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image

from hmil_fast.bags.cache import FeatureCache
from hmil_fast.errors import StoreError, UsageError
from hmil_fast.io.store import FeatureStore
from hmil_fast.labels import LabelTree
from hmil_fast.training.pictures import Node, heatmap_sheet
from hmil_fast.training.predict import slide_attention
from hmil_fast.training.run_folder import Prediction, Run

MOST_PANELS = 11


def draw_heatmap(
    run: Run, store: FeatureStore, slide_id: str, out: Path, nodes: Sequence[str] = ()
) -> Prediction:
    """Draw the attention of the very forward that makes the slide's prediction; write a PNG.

    Args:
        run: A trained run of a model with attention.
        store: Holds the slide's features and its thumbnail.
        slide_id: The slide.
        out: The PNG.
        nodes: Names of tree nodes to draw; by default all of a small tree, else the likeliest.

    Raises:
        UsageError: No such node, the model has no attention, or the PNG cannot be written.
        StoreError: The slide is not in the store, or has no tiles.
    """
    run.check_store(store)
    record = store.record(slide_id)
    jpeg = store.file(slide_id, "thumbnail.jpg")
    if jpeg is None or not record.num_tiles:
        raise StoreError(
            f"slide {slide_id!r} has no {'thumbnail' if record.num_tiles else 'tissue tiles'} "
            f"in {store.path}",
            "extract it again with this version, or look at its overlay",
        )
    cache = FeatureCache(store, [slide_id], run.path)
    prediction, attention = slide_attention(run, cache, slide_id)
    if not attention:
        raise UsageError(
            f"the model {run.config.model!r} of {run.path} has no attention to draw",
            "use a run of --model hmil",
        )
    good = cache.good_tiles(0)
    panels = []
    for level, k in _chosen(run.tree, prediction, nodes):
        weights = np.full(record.num_tiles, np.nan)
        weights[slice(None) if good is None else good] = attention[level][:, k]
        name = _node_name(run.tree, level, k)
        panels.append(Node(name, float(prediction.probabilities[level][k]), weights))
    thumbnail = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
    attrs = record.attrs
    picture = heatmap_sheet(
        thumbnail,
        store.coords(slide_id),
        attrs["tile_px_level0"],
        panels,
        downsample=attrs["level0_size"][0] / thumbnail.shape[1],
        mpp=attrs["mpp"]["level0"],
        title=slide_id,
    )
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


def heatmap_file(run: Run, slide_id: str) -> Path:
    """Where the report looks for a slide's heatmap."""
    return run.path / "heatmaps" / f"{quote(slide_id, safe='')}.png"


def _chosen(tree: LabelTree, prediction: Prediction, names: Sequence[str]) -> list[tuple[int, int]]:
    nodes = [(level, k) for level, count in enumerate(tree.num_classes) for k in range(count)]
    if names:
        for name in names:
            if not any(name in level for level in tree.names):
                every = sorted({n for level in tree.names for n in level})
                raise UsageError(f"no node is called {name!r}", f"name some of {', '.join(every)}")
        return [(level, k) for level, k in nodes if tree.names[level][k] in names]
    likely = sorted(nodes, key=lambda node: -prediction.probabilities[node[0]][node[1]])
    return sorted(likely[:MOST_PANELS])


def _node_name(tree: LabelTree, level: int, k: int) -> str:
    name = tree.names[level][k]
    twice = sum(name in names for names in tree.names) > 1
    return f"{name} (level {level})" if twice else name
