"""Name folders and files of a store; compute chunk and shard sizes and numpy dtypes."""

import hashlib
import math
import re
import uuid
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np

from hmil_fast.errors import StoreError

SCHEMA_VERSION = 1
STORE_FILE = "store.json"
SLIDES = "slides"
COMMIT_FILE = "commit.json"
ASIDE = ".aside-"

MAX_DIM = 65_536
MAX_TILES = 2**31 - 1
MAX_VIEWS = 64
MAX_FILE_BYTES = 64 * 2**20
MAX_SHARD_ROWS = 65_536
MAX_SHARD_BYTES = 256 * 2**20
CHUNK_ROWS = 512
CRC_BYTES = 4

# zarr has no bfloat16: its bits are stored as uint16, and the store's spec says what they mean
STORED_AS: dict[str, np.dtype[Any]] = {
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype("<u2"),
}

_SAFE = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.")
_LONGEST_NAME = 180
ATTEMPT_NAME = re.compile(r"a-[0-9a-f]{32}\.zarr")
_KEY_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,200}")
FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")


def chunk_rows(num_tiles: int) -> int:
    """Rows of a chunk: at most 512, a multiple of 8, such that the last chunk is nearly full."""
    if num_tiles == 0:
        return 8
    return 8 * math.ceil(num_tiles / math.ceil(num_tiles / CHUNK_ROWS) / 8)


def shard_rows(num_tiles: int, row_bytes: int, most_rows: int = MAX_SHARD_ROWS) -> int:
    """Rows of a shard: whole chunks, ≤ 65,536 rows, ≤ 256 MiB, shards of nearly equal length."""
    chunk = chunk_rows(num_tiles)
    chunks = max(1, math.ceil(num_tiles / chunk))
    most = max(1, min(most_rows, MAX_SHARD_BYTES // row_bytes) // chunk)
    return chunk * math.ceil(chunks / math.ceil(chunks / most))


def slide_dirname(slide_id: str) -> str:
    """A safe, distinct folder name for any slide id: UTF-8, percent-escaped, long ones hashed.

    Raises:
        StoreError: the id is empty.
    """
    if not slide_id:
        raise StoreError("a slide id is empty", "Give every slide an id of at least one character.")
    raw = slide_id.encode("utf-8", "surrogatepass")
    name = "".join(chr(b) if b in _SAFE else f"%{b:02X}" for b in raw)
    if name.startswith("."):
        name = "%2E" + name[1:]
    if len(name) > _LONGEST_NAME:
        # "~" is never left unescaped, so a hashed name equals no plain one
        name = f"{name[:120]}~{hashlib.sha256(raw).hexdigest()[:40]}"
    return name


def slide_id_of(dirname: str) -> str | None:
    """The slide id behind a folder name; None when only the commit record knows it."""
    try:
        slide_id = unquote_to_bytes(dirname).decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return None
    return slide_id if slide_id and slide_dirname(slide_id) == dirname else None


def aside_name(file: str) -> str:
    """A new name for a file that `store repair` sets aside until it is swept."""
    return f"{file}{ASIDE}{uuid.uuid4().hex}"


def safe_key(key: str) -> bool:
    """Whether an object's key stays inside its attempt's folder."""
    return len(key) < 1000 and all(_KEY_PART.fullmatch(part) for part in key.split("/"))
