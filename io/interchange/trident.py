"""TRIDENT: `features` (N, D) and `coords` (N, 2) in level-0 px, attributes on the datasets."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from hmil_fast.io.interchange import h5, outgoing
from hmil_fast.io.interchange.bag import Bag, Hints, facts
from hmil_fast.io.interchange.outgoing import Outgoing, Part, magnification
from hmil_fast.io.interchange.tiles import read_tiles

_PREFIX = "features_"


@contextmanager
def read(path: Path, slide_id: str, hints: Hints) -> Iterator[Bag]:
    """Open one slide's features."""
    with h5.open_h5(path) as file:
        rows = h5.shape(file, "features")[0]
        tiles = read_tiles(file, rows)
        own = h5.attrs_of(file, "features")
        encoder = own.get("encoder")
        if encoder in (None, "None") and path.parent.name.startswith(_PREFIX):
            encoder = path.parent.name.removeprefix(_PREFIX)
        yield h5.features(
            file,
            "features",
            hints,
            coords=tiles.coords,
            encoder=hints.encoder or encoder,
            tiling=tiles.tiling,
            attrs=facts(
                "trident",
                {"features": own, "coords": tiles.original},
                tile_px_level0=tiles.side,
                level0_size=tiles.level0_size,
                mpp=hints.mpp_of(slide_id),
            ),
        )


def parts(folder: Path, slide: Outgoing) -> list[Part]:
    """The file to write."""
    coords = slide.needed_coords("trident")
    width, height = slide.level0_size or (None, None)
    about: dict[str, Any] = {
        "patch_size": slide.tile_px,
        "patch_size_level0": slide.tile_px_level0,
        "level0_magnification": magnification(slide.mpp),
        "target_magnification": slide.magnification,
        "overlap": slide.tiling.get("overlap_px") or 0,
        "name": slide.name,
        "level0_width": width,
        "level0_height": height,
    }
    original = slide.original("trident")
    attrs = {
        "coords": about | original.get("coords", {}),
        "features": {"name": slide.name, "encoder": slide.encoder} | original.get("features", {}),
    }
    arrays: h5.Arrays = {"features": slide.bag, "coords": coords}
    path = folder / f"{slide.name}.h5"
    return [outgoing.h5_part(path, partial(read, slide_id=slide.slide_id), arrays, attrs)]
