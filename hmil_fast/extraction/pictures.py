"""Pictures by which a person sees in seconds whether the tiling is right."""

import io

from PIL import Image

from hmil_fast.extraction.prepare import Prepared
from hmil_fast.io.store import FeatureStore, files, slide_dirname
from hmil_fast.io.tiles.tissue import overlay


def save_overlay(store: FeatureStore, ready: Prepared) -> None:
    """The tissue and the tiles on the slide's picture, as `overlays/<slide>.jpg`."""
    picture = overlay(ready.picture, ready.tissue, ready.grid, ready.reader.info)
    _save(picture, store, "overlays", ready.task.slide_id)


def _save(picture: Image.Image, store: FeatureStore, kind: str, slide_id: str) -> None:
    data = io.BytesIO()
    # a tenth of the time of PNG; without chroma subsampling, for the thin coloured lines
    picture.save(data, "JPEG", quality=85, subsampling=0)
    files.make_folder(store.path / kind)
    files.replace(store.path / kind / f"{slide_dirname(slide_id)}.jpg", data.getvalue())
