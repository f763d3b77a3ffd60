"""Pictures by which a person sees in seconds whether the tiling is right."""

import io

from hmil_fast.extraction.prepare import Prepared
from hmil_fast.io.store import FeatureStore, files, slide_dirname
from hmil_fast.io.tiles.tissue import overlay


def save_overlay(store: FeatureStore, ready: Prepared) -> None:
    """The tissue and the tiles on the slide's thumbnail, as `overlays/<slide>.png`."""
    folder = store.path / "overlays"
    files.make_folder(folder)
    picture = overlay(ready.thumbnail, ready.tissue, ready.grid, ready.reader.info)
    name = f"{slide_dirname(ready.task.slide_id)}.png"
    png = io.BytesIO()
    picture.save(png, "PNG", compress_level=1)  # half the time, a tenth more bytes
    files.replace(folder / name, png.getvalue())
