"""AtlasPatch: `coords` (N, 5) of x, y, width, height, level; one `features/<encoder>` or more."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from hmil_fast.io.interchange import h5, outgoing
from hmil_fast.io.interchange.bag import Bag, Hints, check_coords, facts, number, refuse
from hmil_fast.io.interchange.outgoing import Outgoing, Part, as_float32, magnification


@contextmanager
def read(path: Path, slide_id: str, hints: Hints) -> Iterator[Bag]:
    """Open one slide's features by one encoder."""
    with h5.open_h5(path) as file:
        names = [name for name in h5.names(file, "features") if not name.startswith("__tmp")]
        if hints.encoder not in names if hints.encoder else len(names) != 1:
            raise refuse(
                path,
                f"holds features of {', '.join(names[:8]) or 'no encoder'}",
                "Say which to take with --encoder NAME.",
            )
        encoder = hints.encoder or names[0]
        rows = h5.shape(file, f"features/{encoder}")[0]
        boxes = h5.array(file, "coords", rows)
        own = h5.attrs_of(file, "/")
        yield h5.features(
            file,
            f"features/{encoder}",
            hints,
            coords=check_coords(path, boxes, rows),
            encoder=encoder,
            tiling={
                "tile_px": number(own, "patch_size"),
                "magnification": number(own, "target_magnification"),
                "overlap_px": number(own, "overlap"),
            },
            attrs=facts(
                "atlaspatch",
                {"/": own, "coords": h5.attrs_of(file, "coords")},
                tile_px_level0=number(own, "patch_size_level0"),
                level0_size=(number(own, "level0_width"), number(own, "level0_height")),
                mpp=hints.mpp_of(slide_id) or number(own, "mpp"),
            ),
        )


def parts(folder: Path, slide: Outgoing) -> list[Part]:
    """The file to write; tiles as if read from level 0."""
    corners = slide.needed_coords("atlaspatch")
    side = round(slide.attrs.get("read_px") or slide.needed_side("atlaspatch"))
    boxes = np.zeros((len(corners), 5), np.int32)
    boxes[:, :2], boxes[:, 2:4], boxes[:, 4] = corners, side, slide.attrs.get("level", 0)
    width, height = slide.level0_size or (None, None)
    about = {
        "patch_size": slide.tile_px,
        "patch_size_level0": slide.tile_px_level0,
        "level0_magnification": magnification(slide.mpp),
        "target_magnification": slide.magnification,
        "overlap": slide.tiling.get("overlap_px") or 0,
        "level0_width": width,
        "level0_height": height,
        "mpp": slide.mpp,
    } | slide.original("atlaspatch").get("/", {})
    about["num_patches"] = len(corners)
    single = as_float32(slide)
    arrays: h5.Arrays = {"coords": boxes, f"features/{slide.encoder}": single.bag}
    again = partial(read, slide_id=slide.slide_id)
    path = folder / "patches" / f"{slide.name}.h5"
    return [outgoing.h5_part(path, again, arrays, {"/": about})]
