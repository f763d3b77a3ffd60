"""Check that a tile's raw bytes can be a whole JPEG or JPEG 2000 image.

A decoder fills up what it cannot read and says nothing (cuCIM even with whatever lay in memory), so
every source tile is looked at before it is decoded.  A flipped byte inside the entropy-coded data
mostly makes another legal JPEG, wrong from there on: OpenSlide and `LibjpegSource`, which heed
libjpeg's warnings, notice some of those, the others none.
"""

import re
from enum import Enum

Tables = frozenset[int]


class Look(Enum):
    """What a tile's bytes look like."""

    WHOLE = "any decoder reads it"
    ODD = "legal but rare, or damaged"
    BROKEN = "a part was never written"


# inside entropy-coded data 0xFF may only be followed by a stuffed zero, a restart or a fill byte
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
# inside packets 0xFF is never followed by more than 0x8F, but for the two packet markers
_PACKET_MARKER = re.compile(rb"\xff[\x90\x93-\xff]", re.DOTALL)
_FRAMES = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended, progressive
_SEGMENTS = frozenset((0xC4, 0xDA, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0))) | _FRAMES
_BETWEEN_SCANS = frozenset((0xC4, 0xDA, 0xDB, 0xDD, 0xFE))
_TABLES = _SEGMENTS - _FRAMES - {0xDA}
_QUANTISATION, _HUFFMAN, _JFIF, _ADOBE = 0xDB, 0xC4, 0xE0, 0xEE
# tables are noted by number: quantisation from 0, Huffman's from these
_DC, _AC = 0x100, 0x200
_DEFAULT_TABLES = (_DC, _DC + 1, _AC, _AC + 1)  # libjpeg takes the standard's where none is given
# Adobe's segment: its last byte says whether three channels are RGB (0) or YCbCr (1)
_COLOUR = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"


def look_at_jpeg(data: bytes, size: tuple[int, int], tables: Tables | None = None) -> Look:
    """Look for SOI, legal segments, scans and EOI, of three channels of 8 bits.

    Args:
        data: The tile's bytes.
        size: (width, height) in px that its frame header must state: a larger frame would make a
            decoder write past its tile.
        tables: What the TIFF's JPEGTables define, see `jpeg_tables`.
    """
    first, last = _scans(data, size, tables) or (0, len(data))
    # a block takes two bits at least, so no picture has this many zeros: a part was never written
    if data.find(bytes(max(1024, size[0] * size[1] // 64)), first, last) >= 0:
        return Look.BROKEN
    # bytes behind the end do no harm if it is the end, and not damage amid the data
    return Look.WHOLE if first and not data[last:].strip(b"\0\xff") else Look.ODD


def _scans(data: bytes, size: tuple[int, int], tables: Tables | None) -> tuple[int, int] | None:
    """Where the first scan's data begin and where EOI ends, or None where it is not a whole one."""
    if data[:2] != b"\xff\xd8":
        return None
    known = set(_DEFAULT_TABLES if tables is None else tables)
    at, first = 2, 0
    frame: dict[int, int] = {}  # component to quantisation table
    progressive = False
    while True:
        while data[at : at + 2] == b"\xff\xff":
            at += 1
        if data[at : at + 2] == b"\xff\xd9":
            return (first, at + 2) if first else None
        if len(data) < at + 4 or data[at] != 0xFF:
            return None
        kind = data[at + 1]
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if end < at + 4 or end > len(data) or kind not in (_BETWEEN_SCANS if first else _SEGMENTS):
            return None
        body = data[at + 4 : end]
        at = end
        if kind in _FRAMES:
            if frame or not _good_frame(body, size):
                return None
            frame = {body[n]: body[n + 2] for n in (6, 9, 12)}
            progressive = kind == 0xC2
        elif kind in (_QUANTISATION, _HUFFMAN):
            if not _define(kind, body, known):
                return None
        elif kind in (_JFIF, _ADOBE) and not _known_version(kind, body):
            return None
        elif kind == 0xDA:
            if (first and not progressive) or not _good_scan(body, frame, known, progressive):
                return None
            first = first or at
            marker = _MARKER.search(data, at)
            if marker is None:
                return None
            at = marker.start()


def _known_version(kind: int, body: bytes) -> bool:
    """Whether a segment is one that libjpeg takes without a warning, on which cuCIM gives up."""
    if kind == _JFIF:
        return len(body) < 14 or body[:5] != b"JFIF\0" or body[5] == 1
    return len(body) < 12 or body[:5] != b"Adobe" or body[11] <= 1


def _good_frame(body: bytes, size: tuple[int, int]) -> bool:
    """Eight bits, three channels, the size, and sampling factors that a decoder takes."""
    shape = int.from_bytes(body[3:5], "big"), int.from_bytes(body[1:3], "big")
    if len(body) != 15 or body[0] != 8 or body[5] != 3 or shape != size:
        return False
    return all(1 <= body[n] >> 4 <= 4 and 1 <= body[n] & 15 <= 4 for n in (7, 10, 13))


def _good_scan(body: bytes, frame: dict[int, int], known: set[int], progressive: bool) -> bool:
    """Whether the scan's components and all tables that they name are there."""
    count = body[0] if body else 0
    if not 1 <= count <= 3 or len(body) != 4 + 2 * count:
        return False
    first, last = body[-3:-1]
    if progressive and (first > last or last > 63 or (first == 0 and last > 0)):
        return False
    for component, choice in zip(body[1:-3:2], body[2:-3:2], strict=True):
        if component not in frame or frame[component] not in known:
            return False
        needed = {_DC + (choice >> 4), _AC + (choice & 15)}
        if not progressive and not needed <= known:
            return False
    return True


def _define(kind: int, body: bytes, known: set[int]) -> bool:
    """Note the tables that a segment defines; whether it is made of whole ones."""
    at = 0
    while at < len(body):
        high, low = body[at] >> 4, body[at] & 15
        if kind == _QUANTISATION:
            known.add(low)
            at += 65 + 64 * high
        else:
            known.add((_AC if high else _DC) + low)
            at += 17 + sum(body[at + 1 : at + 17])
    return at == len(body)


def jpeg_tables(tables: bytes) -> Tables | None:
    """What JPEGTables define; None where they are no tables: above all they may hold no frame."""
    known = set(_DEFAULT_TABLES)
    if not tables:
        return frozenset(known)
    at = 2
    while at + 4 <= len(tables) - 2:
        end = at + 2 + int.from_bytes(tables[at + 2 : at + 4], "big")
        kind, body = tables[at + 1], tables[at + 4 : end]
        if tables[at] != 0xFF or kind not in _TABLES:
            return None
        if kind in (_QUANTISATION, _HUFFMAN) and not _define(kind, body, known):
            return None
        if kind in (_JFIF, _ADOBE) and not _known_version(kind, body):
            return None
        at = end
    good = tables[:2] == b"\xff\xd8" and tables[at:] == b"\xff\xd9"
    return frozenset(known) if good else None


def full_jpeg(data: bytes, tables: bytes, *, ycbcr: bool) -> bytes:
    """A whole tile as a JPEG that decodes by itself, in the colours that the TIFF states.

    The tile's own application segments (JFIF, Adobe, …) are left out: a decoder would follow them
    instead of the TIFF's tag.

    Args:
        data: The tile's bytes, seen to be whole.
        tables: The TIFF's JPEGTables, or nothing.
        ycbcr: Whether Photometric says YCbCr; otherwise the channels are RGB.
    """
    view = memoryview(tables[2:-2] + data[2:])
    parts: list[bytes | memoryview] = [b"\xff\xd8", _COLOUR, b"\1" if ycbcr else b"\0"]
    at = kept = 0
    while view[at + 1] != 0xDA:
        # a fill byte before a marker counts as a part of the segment before it
        end = at + 1 if view[at + 1] == 0xFF else at + 2 + int.from_bytes(view[at + 2 : at + 4])
        if 0xE0 <= view[at + 1] <= 0xEF:
            parts.append(view[kept:at])
            kept = end
        at = end
    parts.append(view[kept:])
    return b"".join(parts)


def whole_jpeg2000(data: bytes, size: tuple[int, int]) -> bool:
    """Whether `data` is a raw codestream: main header, tile-parts of the length they state, EOC.

    Args:
        data: The tile's bytes.
        size: (width, height) in px that its SIZ segment must state, with three channels.
    """
    if data[:4] != b"\xff\x4f\xff\x51":
        return False
    x1, y1, x0, y0 = (int.from_bytes(data[at : at + 4], "big") for at in (8, 12, 16, 20))
    # three channels of 8 bits, none of them subsampled
    if (x1 - x0, y1 - y0) != size or data[40:51] != b"\0\3" + 3 * b"\7\1\1":
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


def is_subsampled(data: bytes) -> bool:
    """Whether a channel of a whole JPEG tile has fewer samples than another."""
    at = 2
    while data[at + 1] not in _FRAMES:
        at += 1 if data[at + 1] == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4])
    return len({data[at + n] for n in (11, 14, 17)}) > 1
