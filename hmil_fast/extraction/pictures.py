"""Draw the overlay of a slide's tissue and tiles, and the contact sheet of its tiles."""

import hashlib
import io
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from hmil_fast.extraction.prepare import Prepared
from hmil_fast.fonts import drawn, picture_font
from hmil_fast.io.store import FeatureStore, slide_dirname
from hmil_fast.io.store.backend import backend_of
from hmil_fast.io.tiles.grid import TileGrid
from hmil_fast.io.tiles.stain import mapped
from hmil_fast.io.tiles.tissue import overlay, tile_colour

SHEET_TILES, SHEET_COLUMNS = 40, 8  # one row of each coarser scale
CELL_PX = 96  # about: tiles are shrunk or enlarged by whole numbers, which is quick
_GAP_PX, _LINE_PX, _SPACE_PX, _FONT_PX = 4, 20, 16, 12
_PAPER, _INK, _BAD = (255, 255, 255), (40, 40, 40), (220, 30, 30)
_BARS_UM = [step * 10**power for power in range(5) for step in (1, 2, 5)]

_Words = tuple[str, tuple[int, int, int]]


def save_overlay(store: FeatureStore, ready: Prepared) -> None:
    """The tissue and the tiles on the slide's picture, as `overlays/<slide>.jpg`."""
    info, slide_id = ready.reader.info, ready.task.slide_id
    picture = overlay(ready.picture, ready.tissue, ready.grids, info)
    um_per_px = info.level_mpp(0) * info.level_dimensions[0][0] / picture.width
    words = [(slide_id, _INK)]
    words += [(_tiles(grid), tile_colour(n)) for n, grid in enumerate(ready.grids)]
    words += [(what, _BAD) for what, _ in ready.notes]
    picture = _with_foot(picture, um_per_px, picture.width / 5, words)
    # without chroma subsampling, for the thin coloured lines
    _save(picture, store, "overlays", slide_id, subsampling=0)


class ContactSheet:
    """Some tiles of a slide on one picture, kept small while all of them pass by.

    Which ones follows from the slide's id and its number of tiles. They are shown as the encoder
    gets them: with their stains normalised, where that is done.

    Args:
        store: Where the sheet goes.
        ready: The slide.
    """

    def __init__(self, store: FeatureStore, ready: Prepared) -> None:
        self._store, self._slide_id = store, ready.task.slide_id
        digest = hashlib.sha256(self._slide_id.encode("utf-8", "surrogatepass")).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        self._stain = ready.stain
        self._strips = [
            _Strip(grid, SHEET_COLUMNS if scale else SHEET_TILES, rng)
            for scale, grid in enumerate(ready.grids)
        ]

    def look(
        self, scale: int, first: int, pixels: NDArray[np.uint8] | Tensor, status: NDArray[np.uint8]
    ) -> None:
        """Keep what is to be shown of tiles [n, read_px, read_px, 3], a grid's row `first` on."""
        self._strips[scale].look(first, pixels, status)

    def draw(self) -> Image.Image:
        """The tiles in the order of each grid; bad ones, which are blank, in a red frame."""
        words = [(self._slide_id, _INK)]
        if self._stain is not None:
            words += [("stains not normalised" if self._stain.note else "stains normalised", _INK)]
        matrix = None if self._stain is None else self._stain.matrix
        parts = [strip.draw(matrix, [] if n else words) for n, strip in enumerate(self._strips)]
        size = max(part.width for part in parts), sum(part.height for part in parts)
        sheet, y = Image.new("RGB", size, _PAPER), 0
        for part in parts:
            sheet.paste(part, (0, y))
            y += part.height
        return sheet

    def save(self) -> None:
        """Write it as `contact-sheets/<slide>.jpg`; nothing where the slide has no tiles."""
        if len(self._strips[0].picks):
            _save(self.draw(), self._store, "contact-sheets", self._slide_id)


class _Strip:
    """Some tiles of one scale."""

    def __init__(self, grid: TileGrid, most: int, rng: np.random.Generator) -> None:
        self._grid = grid
        count = len(grid.coords)
        self.picks = np.sort(rng.choice(count, min(most, count), replace=False))
        self._shrink = max(1, round(grid.read_px / CELL_PX))
        self._grow = max(1, CELL_PX // grid.read_px)
        self._cell = -(-grid.read_px // self._shrink) * self._grow
        self._shown: dict[int, tuple[NDArray[np.uint8], bool]] = {}

    def look(
        self, first: int, pixels: NDArray[np.uint8] | Tensor, status: NDArray[np.uint8]
    ) -> None:
        low, high = np.searchsorted(self.picks, (first, first + len(pixels)))
        picks = self.picks[low:high]
        if not len(picks):
            return
        if isinstance(pixels, Tensor):  # these few only come from a device
            wanted = pixels[torch.from_numpy(picks - first).to(pixels.device)].numpy(force=True)
        else:
            wanted = pixels[picks - first]
        for pick, picture in zip(picks.tolist(), wanted, strict=True):
            tile = Image.fromarray(picture).reduce(self._shrink)
            self._shown[pick] = np.asarray(tile), bool(status[pick - first])

    def draw(self, matrix: NDArray[np.float64] | None, words: Sequence[_Words]) -> Image.Image:
        pitch = self._cell + _GAP_PX
        rows = max(1, -(-len(self.picks) // SHEET_COLUMNS))
        size = SHEET_COLUMNS * pitch + _GAP_PX, rows * pitch + _GAP_PX
        sheet = np.full((size[1], size[0], 3), _PAPER, np.uint8)
        for place, pick in enumerate(self.picks.tolist()):
            tile, bad = self._shown[pick]
            y, x = (_GAP_PX + index * pitch for index in divmod(place, SHEET_COLUMNS))
            if bad:
                sheet[y - 2 : y + self._cell + 2, x - 2 : x + self._cell + 2] = _BAD
            elif matrix is not None:
                tile = mapped(tile, matrix)
            large = tile.repeat(self._grow, axis=0).repeat(self._grow, axis=1)
            sheet[y : y + self._cell, x : x + self._cell] = large
        said = [*words, (f"{len(self.picks)} of {_tiles(self._grid)}", _INK)]
        count = sum(bad for _, bad in self._shown.values())
        if count:
            said.append((f"{count} of these cannot be decoded (red)", _BAD))
        um_per_px = self._grid.mpp_read * self._shrink / self._grow
        return _with_foot(Image.fromarray(sheet), um_per_px, self._cell, said)


def _tiles(grid: TileGrid) -> str:
    return f"{len(grid.coords):,} tiles of {grid.tile_px} px at {grid.mpp_effective:.3g} µm/px"


def _with_foot(
    picture: Image.Image, um_per_px: float, longest: float, words: Sequence[_Words]
) -> Image.Image:
    """A picture with a scale bar of at most `longest` px and coloured words below it."""
    bar_um = max((um for um in _BARS_UM if um <= longest * um_per_px), default=_BARS_UM[0])
    bar_px = bar_um / um_per_px
    bar = f"{bar_um} µm" if bar_um < 1000 else f"{bar_um // 1000} mm"
    x, line, wide = _GAP_PX + bar_px + _GAP_PX, 0, picture.width
    placed = []
    for text, colour in [(bar, _INK), *((drawn(text), colour) for text, colour in words)]:
        length = picture_font(text, _FONT_PX).getlength(text)
        if x > _GAP_PX and x + length > picture.width:
            x, line = _GAP_PX, line + 1
        placed.append((x, line, text, colour))
        x += length + _SPACE_PX
        wide = max(wide, int(x))
    whole = Image.new("RGB", (wide, picture.height + (line + 1) * _LINE_PX + 4), _PAPER)
    whole.paste(picture)
    draw = ImageDraw.Draw(whole)
    middle = picture.height + _LINE_PX // 2 + 1
    draw.rectangle((_GAP_PX, middle - 2, _GAP_PX + bar_px, middle + 1), fill=_INK)
    for x, line, text, colour in placed:
        font = picture_font(text, _FONT_PX)
        draw.text((x, middle + line * _LINE_PX), text, fill=colour, font=font, anchor="lm")
    return whole


def _save(
    picture: Image.Image, store: FeatureStore, kind: str, slide_id: str, subsampling: int = 2
) -> None:
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=85, subsampling=subsampling)  # a tenth of PNG's time
    backend = backend_of(store.path)
    backend.make_folder(store.path / kind)
    backend.replace(store.path / kind / f"{slide_dirname(slide_id)}.jpg", data.getvalue())
