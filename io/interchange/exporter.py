"""Export one slide of a store to files of another tool; existing files are never overwritten."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hmil_fast.errors import SlideError
from hmil_fast.files import create_file
from hmil_fast.io.interchange.bag import COORDS, Bag, Hints
from hmil_fast.io.interchange.formats import Format
from hmil_fast.io.interchange.importer import Taken
from hmil_fast.io.interchange.outgoing import Outgoing, Part
from hmil_fast.io.store import FeatureStore, local, slide_dirname


def export_slide(
    store: FeatureStore, form: Format, slide_id: str, folder: Path, mpp: float | None = None
) -> Taken:
    """Write one slide's files below a folder, or find them written.

    Tiles that could not be decoded are left out. bfloat16 becomes float32.

    Args:
        store: The store.
        form: What to write.
        slide_id: A slide of it; file names carry it escaped.
        folder: Where; made if it does not exist.
        mpp: Level-0 µm/px, where the store does not say.

    Raises:
        SlideError: the format needs what the store does not know, or a file of another content
            lies there.
        StoreError: the slide is damaged, or the disk refuses.
    """
    slide, left_out = _outgoing(store, slide_id, mpp)
    before = True
    assert form.parts is not None, f"nothing is exported as {form.name}"
    for part in form.parts(folder, slide):
        before &= not _put(part, slide, Hints(mpp={} if slide.mpp is None else {"": slide.mpp}))
    notes = (f"{left_out} bad tiles left out",) if left_out else ()
    return Taken(slide.bag.shape[0], before, notes)


def _outgoing(store: FeatureStore, slide_id: str, mpp: float | None) -> tuple[Outgoing, int]:
    record = store.record(slide_id)
    status = store.status(slide_id)
    good = np.flatnonzero(status == 0)
    bfloat16 = record.dtype == "bfloat16"

    def read(start: int, stop: int) -> npt.NDArray[Any]:
        chosen = good[start:stop]
        first = int(chosen[0])
        rows = store.read_rows(slide_id, first, int(chosen[-1]) + 1)[chosen - first]
        return (rows.astype(np.uint32) << 16).view(np.float32) if bfloat16 else rows

    located = record.attrs.get("coords_convention", COORDS) is not None
    bag = Bag(
        (len(good), record.dim),
        "float32" if bfloat16 else record.dtype,
        read,
        store.coords(slide_id)[good].astype(np.int64) if located else None,
    )
    # a name such as "hub/model" would be a path inside of a file
    encoder = re.sub(r"[^\w.:-]", "_", str(store.spec.encoder.get("name", "unknown")))
    found = record.attrs.get("mpp", {}).get("level0", mpp)
    slide = Outgoing(
        slide_id,
        slide_dirname(slide_id),
        bag,
        encoder,
        dict(store.spec.tiling),
        record.attrs,
        found,
    )
    return slide, len(status) - len(good)


def _put(part: Part, slide: Outgoing, hints: Hints) -> bool:
    """Write one file whole under its name; False when it lies there already."""
    try:
        if not os.path.lexists(part.path):
            part.path.parent.mkdir(parents=True, exist_ok=True)
            if create_file(part.path, part.write):
                return True
    except OSError as error:
        raise local.failed(error, f"exporting slide {slide.slide_id!r}", part.path) from error
    if not part.same(part.path, hints):
        raise SlideError(
            f"{part.path} exists with other content than slide {slide.slide_id!r} of the store",
            "Export into another folder, or move that file away.",
        )
    return False
