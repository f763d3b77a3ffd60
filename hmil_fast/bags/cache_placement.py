"""Choose where features are cached: GPU memory, main memory, a mapped file, or not at all."""

from pathlib import Path
from shutil import disk_usage
from typing import NamedTuple

import torch

from hmil_fast.config import CACHES
from hmil_fast.device import free_memory, local_ranks
from hmil_fast.errors import UsageError


class Tier(NamedTuple):
    """A place for features, and the reason for it in few words.

    ``device``: the device's memory; ``host``: main memory, pinned beside a GPU; ``map``: a scratch
    file that is mapped; ``stream``: the store alone, read anew for every batch.
    """

    name: str
    why: str


def choose_tier(wish: str, size: int, device: torch.device, scratch: Path) -> Tier:
    """Choose the first tier whose free space is at least twice the size of the features.

    Args:
        wish: One of `config.CACHES`.
        size: Bytes of all features.
        device: Where the batches will be asked for.
        scratch: Folder on the disk that a scratch file would be on.

    Raises:
        UsageError: No such tier.
    """
    if wish not in CACHES:
        raise UsageError(f"setting cache is {wish!r}", f"choose one of {', '.join(CACHES)}")
    if wish != "auto":
        return Tier(wish, "asked for")
    ranks = local_ranks()  # each keeps its own
    free = {"device": free_memory(device)} if device.type == "cuda" else {}
    free |= {
        "host": free_memory(torch.device("cpu")) // ranks,
        "map": disk_usage(scratch).free // ranks,
    }
    for name, room in free.items():
        if 2 * size <= room:
            return Tier(name, f"{gb(room)} were free")
    return Tier("stream", f"nothing holds them: {', '.join(map(gb, free.values()))} were free")


def gb(size: int) -> str:
    """Format bytes as GB."""
    return f"{size / 1e9:,.1f} GB"
