"""A slide's attention per node of the label tree, and the tiles that get most of it."""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hmil_fast.bags.cache import FeatureCache
from hmil_fast.errors import SlideError, StoreError
from hmil_fast.io.store import FeatureStore, SlideRecord
from hmil_fast.labels import LabelTree
from hmil_fast.training.predict import slide_attention
from hmil_fast.training.run_folder import Prediction, Run


class NodeMap(NamedTuple):
    """The attention paid for the sake of one node.

    Attributes:
        level: Level of the node.
        node: Index of the node on its level; None where one map serves all nodes.
        weights: float64 [num_tiles], summing to 1; NaN for a tile that is in no bag.
    """

    level: int
    node: int | None
    weights: NDArray[np.float64]


def slide_maps(run: Run, store: FeatureStore, slide_id: str) -> tuple[Prediction, list[NodeMap]]:
    """A slide's prediction and the attention maps of that very forward, in the tree's order.

    A model of a single map, or with attention on the finest level only, gives just those; a model
    without attention gives none.

    Raises:
        StoreError: The slide is not in the store.
    """
    cache = FeatureCache(store, [slide_id], run.path)
    prediction, attention = slide_attention(run, cache, slide_id)
    good = cache.good_tiles(0)
    num_tiles = store.record(slide_id).num_tiles
    # fewer entries than levels are those of the finest levels
    first = run.tree.num_levels - len(attention)
    maps = []
    for level, columns in enumerate(attention, start=first):
        own = columns.shape[1] == run.tree.num_classes[level]
        for k in range(columns.shape[1]):
            weights = np.full(num_tiles, np.nan)
            weights[slice(None) if good is None else good] = columns[:, k]
            maps.append(NodeMap(level, k if own else None, weights))
    if len(maps) > 1 and all(_equal(m.weights, maps[0].weights) for m in maps):
        maps = [NodeMap(run.tree.num_levels - 1, None, maps[0].weights)]
    return prediction, maps


def _equal(a: NDArray[np.float64], b: NDArray[np.float64]) -> bool:
    return bool(np.allclose(a, b, rtol=1e-9, atol=0, equal_nan=True))


def read_thumbnail(store: FeatureStore, record: SlideRecord) -> NDArray[np.uint8]:
    """A stored slide's thumbnail, uint8 [h, w, 3].

    Raises:
        StoreError: The slide has no thumbnail, or no tiles to show on it.
    """
    jpeg = store.file(record.slide_id, "thumbnail.jpg")
    if jpeg is None or not record.num_tiles:
        raise StoreError(
            f"slide {record.slide_id!r} has no "
            f"{'thumbnail' if record.num_tiles else 'tissue tiles'} in {store.path}",
            "extract it again with this version, or look at its overlay",
        )
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def node_name(tree: LabelTree, level: int, node: int | None) -> str:
    """The name of a map's node, with its level where the name alone is not enough."""
    if node is None:
        return "attention"
    name = tree.names[level][node]
    twice = sum(name in names for names in tree.names) > 1
    return f"{name} (level {level})" if twice else name


def top_tiles(weights: NDArray[np.float64], k: int) -> NDArray[np.intp]:
    """The at most k tiles of the highest attention, highest first; of equals the earlier."""
    order = np.argsort(np.where(np.isfinite(weights), -weights, np.inf), kind="stable")
    return order[: min(k, int(np.isfinite(weights).sum()))]


def cut_tiles(slide: Path, record: SlideRecord, corners: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Read tiles of a stored slide from its file, at the resolution they were encoded at.

    Args:
        slide: The slide's file.
        record: The slide in the store.
        corners: Top-left corners in level-0 px, int [n, 2].

    Returns:
        uint8 [n, read_px, read_px, 3]; what cannot be read is white.

    Raises:
        SlideError: The file is not the one that was extracted, or cannot be opened.
    """
    from hmil_fast.io.slide import open_slide

    attrs = record.attrs
    if not {"read_px", "level"} <= set(attrs):
        raise SlideError(
            f"the store does not say how the tiles of {record.slide_id!r} were read",
            "extract the slide with hmil-fast to see its tiles",
        )
    size, level = int(attrs["read_px"]), int(attrs["level"])
    with open_slide(slide) as reader:
        dimensions = reader.info.level_dimensions
        if list(dimensions[0]) != list(attrs["level0_size"]) or level >= len(dimensions):
            raise SlideError(
                f"{slide} is {dimensions[0][0]} × {dimensions[0][1]} px, but the slide "
                f"{record.slide_id!r} in the store has {attrs['level0_size'][0]} × "
                f"{attrs['level0_size'][1]} px",
                "name the file that was extracted",
            )
        scale = np.array(dimensions[level]) / np.array(dimensions[0])
        out = np.empty((len(corners), size, size, 3), dtype=np.uint8)
        reader.read(level, np.rint(corners * scale).astype(np.int64), size, out)
    return out
