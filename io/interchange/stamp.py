"""STAMP: `feats` and `coords` in µm; attributes on the file. Pixels need the slide's mpp."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from hmil_fast.errors import SlideError
from hmil_fast.io.interchange import h5, outgoing
from hmil_fast.io.interchange.bag import Bag, Hints, check_coords, facts, number, refuse
from hmil_fast.io.interchange.outgoing import Outgoing, Part


@contextmanager
def read(path: Path, slide_id: str, hints: Hints) -> Iterator[Bag]:
    """Open one slide's features."""
    mpp = hints.mpp_of(slide_id)
    if mpp is None:
        raise refuse(
            path,
            "its coordinates are micrometres and it does not state the slide's µm/px",
            "Give --slide-mpp X, or --manifest CSV with columns slide_id,mpp.",
        )
    with h5.open_h5(path) as file:
        own = h5.attrs_of(file, "/")
        if own.get("unit") != "um" or own.get("feat_type", "tile") != "tile":
            raise refuse(
                path,
                f"unit is {own.get('unit')!r}, feat_type {own.get('feat_type')!r}",
                "Extract the slide with STAMP 2 (tile features in µm), or with hmil-fast.",
            )
        rows = h5.shape(file, "feats")[0]
        micrometres = h5.array(file, "coords", rows)
        um = number(own, "tile_size_um") or number(own, "tile_size")
        yield h5.features(
            file,
            "feats",
            hints,
            coords=check_coords(path, np.rint(micrometres.astype(np.float64) / mpp), rows),
            encoder=hints.encoder or own.get("extractor"),
            tiling={"tile_px": number(own, "tile_size_px"), "tile_um": um},
            attrs=facts(
                "stamp",
                {"/": own},
                tile_px_level0=None if um is None else um / mpp,
                mpp=mpp,
            ),
        )


def parts(folder: Path, slide: Outgoing) -> list[Part]:
    """The file to write; features as float16 or float32 as they are in the store."""
    coords = slide.needed_coords("stamp")
    mpp, side = slide.mpp, slide.needed_side("stamp")
    if mpp is None:
        raise SlideError(
            f"slide {slide.slide_id!r} states no µm/px, which stamp files need",
            "Give --slide-mpp X, or --manifest CSV with columns slide_id,mpp.",
        )
    about = {
        "extractor": slide.encoder,
        "unit": "um",
        "tile_size_um": side * mpp,
        "tile_size_px": slide.tile_px,
        "feat_type": "tile",
    } | slide.original("stamp").get("/", {})
    arrays: h5.Arrays = {"feats": slide.bag, "coords": (coords * mpp).astype(np.float32)}
    path = folder / f"{slide.name}.h5"
    again = partial(read, slide_id=slide.slide_id)
    return [outgoing.h5_part(path, again, arrays, {"/": about})]
