"""Whether a tile's raw bytes can be a whole JPEG or JPEG 2000 image.

cuCIM decodes a corrupt JPEG tile to whatever lay in memory and says nothing, so every source tile
is looked at once before it is decoded.  A flipped byte inside the entropy-coded data is still a
legal JPEG: no decoder can tell.
"""

import re

# inside entropy-coded data 0xFF may only be followed by a stuffed zero, a restart or a fill byte
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
# inside packets 0xFF is never followed by more than 0x8F, but for the two packet markers
_PACKET_MARKER = re.compile(rb"\xff[\x90\x93-\xff]", re.DOTALL)
_FRAMES = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended, progressive
_SEGMENTS = frozenset((0xC4, 0xDA, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0))) | _FRAMES
_BETWEEN_SCANS = frozenset((0xC4, 0xDA, 0xDB, 0xDD, 0xFE))
# Adobe's segment with transform 0: three channels that are RGB as they are
_ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"


def whole_jpeg(data: bytes, size: tuple[int, int]) -> bool:
    """Whether `data` is SOI, legal segments, scans and EOI, of three channels.

    Args:
        data: The tile's bytes (an abbreviated stream: its tables may lie elsewhere).
        size: (width, height) in px that its frame header must state: a larger frame would make a
            decoder write past its tile.
    """
    if data[:2] != b"\xff\xd8":
        return False
    at, frame, scans = 2, 0, 0
    while True:
        while data[at : at + 2] == b"\xff\xff":
            at += 1
        if len(data) < at + 2 or data[at] != 0xFF:
            return False
        kind = data[at + 1]
        if kind == 0xD9:
            # an end amid the data is damage; a little padding is not
            return scans > 0 and (len(data) - at < 64 or not data[at + 2 :].strip(b"\0"))
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        end = at + 2 + length
        if length < 2 or end > len(data) or kind not in (_BETWEEN_SCANS if scans else _SEGMENTS):
            return False
        if kind in _FRAMES:
            shape = (
                int.from_bytes(data[at + 7 : at + 9], "big"),
                int.from_bytes(data[at + 5 : at + 7], "big"),
            )
            if frame or length < 17 or data[at + 4] != 8 or data[at + 9] != 3 or shape != size:
                return False
            frame = kind
        at = end
        if kind == 0xDA:
            if not frame or (scans and frame != 0xC2):
                return False
            scans += 1
            marker = _MARKER.search(data, at)
            if marker is None:
                return False
            at = marker.start()


def full_jpeg(data: bytes, tables: bytes, *, ycbcr: bool) -> bytes:
    """A whole tile as a JPEG that decodes by itself.

    Args:
        data: The tile's bytes, seen to be whole.
        tables: The TIFF's JPEGTables, or nothing.
        ycbcr: Whether Photometric says YCbCr; otherwise the channels are RGB, which no decoder
            guesses of three channels.
    """
    colour = b"" if ycbcr else _ADOBE_RGB
    return b"".join((b"\xff\xd8", tables[2:-2], colour, memoryview(data)[2:]))


def whole_jpeg2000(data: bytes, size: tuple[int, int]) -> bool:
    """Whether `data` is a raw codestream: main header, tile-parts of the length they state, EOC.

    Args:
        data: The tile's bytes.
        size: (width, height) in px that its SIZ segment must state, with three channels.
    """
    if data[:4] != b"\xff\x4f\xff\x51":
        return False
    x1, y1, x0, y0 = (int.from_bytes(data[at : at + 4], "big") for at in (8, 12, 16, 20))
    if (x1 - x0, y1 - y0) != size or data[40:42] != b"\0\3":
        return False
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\x90":
        at += 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
    parts = 0
    while data[at : at + 2] == b"\xff\x90":
        length = int.from_bytes(data[at + 6 : at + 10], "big")
        end = at + length if length else len(data) - 2
        body = data.find(b"\xff\x93", at + 12, end)
        if end > len(data) - 2 or body < 0 or _PACKET_MARKER.search(data, body + 2, end):
            return False
        at, parts = end, parts + 1
    return parts > 0 and data[at : at + 2] == b"\xff\xd9"
