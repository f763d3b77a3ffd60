"""The importer of slide2vec on files that are damaged or of something else."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hmil_fast.errors import SlideError
from hmil_fast.io.interchange import FORMATS, Hints

Layout = Callable[..., Path]


def test_slide2vec_files_that_are_damaged_or_of_something_else(
    lay_out: Layout, tmp_path: Path
) -> None:
    path = lay_out("slide2vec", tmp_path / "in", "a", kind="npz")
    meta, data = path.with_name("a.meta.json"), path.read_bytes()
    said = json.loads(meta.read_text())

    def refused(why: str) -> None:
        read = FORMATS["slide2vec"].read(path, "a", Hints())
        with pytest.raises(SlideError, match=why), read as bag:
            list(bag.blocks())

    path.write_bytes(data[: len(data) // 2])
    refused("not a sound .npz file")
    np.savez_compressed(path, features=np.array([{}], object))
    refused("of object")
    np.savez_compressed(path, features=np.zeros((2**20, 24), np.float32))
    refused("claims 100,663,296 bytes")
    np.savez_compressed(path, latents=np.zeros((4, 24), np.float32))
    refused("no array 'features', but latents.npy")
    path.write_bytes(data)
    meta.write_text(json.dumps(said | {"num_tiles": 699}))
    refused("has 700 tiles, its .meta.json says 699: half written")
    meta.write_text(json.dumps(said | {"artifact_type": "hierarchical_embeddings"}))
    refused("holds hierarchical_embeddings")
    meta.write_text("[1]")
    refused("not a sound JSON: not a mapping")
    meta.write_text(json.dumps(said))
    coords = tmp_path / "in" / "tiles" / "a.coordinates.npz"
    np.savez_compressed(coords, x=np.zeros(699, int), y=np.zeros(699, int))
    refused(r"700 rows of features but 'x' is int64 \(699,\)")
    path.unlink()
    path = meta
    refused("its file of features, .pt or .npz, is missing")
