"""Pictures by which a person sees in seconds whether the tiling is right."""

import hashlib
import io
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from hmil_fast.extraction.prepare import Prepared
from hmil_fast.io.store import FeatureStore, files, slide_dirname
from hmil_fast.io.tiles.grid import TileGrid
from hmil_fast.io.tiles.tissue import overlay

SHEET_TILES, SHEET_COLUMNS = 40, 8
CELL_PX = 96  # about: tiles are shrunk or enlarged by whole numbers, which is quick
_GAP_PX, _FOOT_PX = 4, 28
_PAPER, _INK, _BAD = (255, 255, 255), (40, 40, 40), (220, 30, 30)
_BARS_UM = [step * 10**power for power in range(5) for step in (1, 2, 5)]


def save_overlay(store: FeatureStore, ready: Prepared) -> None:
    """The tissue and the tiles on the slide's picture, as `overlays/<slide>.jpg`."""
    picture = overlay(ready.picture, ready.tissue, ready.grid, ready.reader.info)
    # without chroma subsampling, for the thin coloured lines
    _save(picture, store, "overlays", ready.task.slide_id, subsampling=0)


class ContactSheet:
    """Some tiles of a slide on one picture, kept small while all of them pass by.

    Which ones follows from the slide's id and its number of tiles.

    Args:
        store: Where the sheet goes.
        slide_id: The slide.
        grid: Its tiles.
    """

    def __init__(self, store: FeatureStore, slide_id: str, grid: TileGrid) -> None:
        self._store, self._slide_id, self._grid = store, slide_id, grid
        count = len(grid.coords)
        digest = hashlib.sha256(slide_id.encode("utf-8", "surrogatepass")).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        self._picks = np.sort(rng.choice(count, min(SHEET_TILES, count), replace=False))
        self._shrink = max(1, round(grid.read_px / CELL_PX))
        self._grow = max(1, CELL_PX // grid.read_px)
        self._cell = -(-grid.read_px // self._shrink) * self._grow
        self._shown: dict[int, tuple[NDArray[np.uint8], bool]] = {}

    def look(self, first: int, pixels: NDArray[np.uint8], status: NDArray[np.uint8]) -> None:
        """Keep what is to be shown of tiles [n, read_px, read_px, 3], the grid's row `first` on."""
        low, high = np.searchsorted(self._picks, (first, first + len(pixels)))
        for pick in self._picks[low:high].tolist():
            tile = Image.fromarray(pixels[pick - first]).reduce(self._shrink)
            self._shown[pick] = np.asarray(tile), bool(status[pick - first])

    def draw(self) -> Image.Image:
        """The tiles in the order of the grid; bad ones, which are blank, in a red frame."""
        pitch = self._cell + _GAP_PX
        rows = max(1, -(-len(self._picks) // SHEET_COLUMNS))
        size = SHEET_COLUMNS * pitch + _GAP_PX, rows * pitch + _GAP_PX + _FOOT_PX
        sheet = np.full((size[1], size[0], 3), _PAPER, np.uint8)
        for place, pick in enumerate(self._picks.tolist()):
            tile, bad = self._shown[pick]
            y, x = (_GAP_PX + index * pitch for index in divmod(place, SHEET_COLUMNS))
            if bad:
                sheet[y - 2 : y + self._cell + 2, x - 2 : x + self._cell + 2] = _BAD
            large = tile.repeat(self._grow, axis=0).repeat(self._grow, axis=1)
            sheet[y : y + self._cell, x : x + self._cell] = large
        picture = Image.fromarray(sheet)
        self._draw_foot(ImageDraw.Draw(picture), size[1] - _FOOT_PX // 2 - 2)
        return picture

    def save(self) -> None:
        """Write it as `contact-sheets/<slide>.jpg`; nothing where the slide has no tiles."""
        if len(self._picks):
            _save(self.draw(), self._store, "contact-sheets", self._slide_id)

    def _draw_foot(self, draw: ImageDraw.ImageDraw, y: int) -> None:
        grid = self._grid
        um_per_px = grid.mpp_read * self._shrink / self._grow
        bar_um = max((um for um in _BARS_UM if um <= self._cell * um_per_px), default=_BARS_UM[0])
        end = _GAP_PX + bar_um / um_per_px
        draw.rectangle((_GAP_PX, y - 2, end, y + 1), fill=_INK)
        text = (
            f"{bar_um} um    {len(self._picks)} of {len(grid.coords):,} tiles of {grid.tile_px} px "
            f"at {grid.mpp_effective:.3g} um/px"  # the font has no µ
        )
        bad = sum(bad for _, bad in self._shown.values())
        if bad:
            text += f", {bad} of these cannot be decoded (red)"
        draw.text((end + 8, y), text, fill=_INK, font=_font(), anchor="lm")


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(13)


def _save(
    picture: Image.Image, store: FeatureStore, kind: str, slide_id: str, subsampling: int = 2
) -> None:
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=85, subsampling=subsampling)  # a tenth of PNG's time
    files.make_folder(store.path / kind)
    files.replace(store.path / kind / f"{slide_dirname(slide_id)}.jpg", data.getvalue())
