"""Feature files as other tools lay them out, written from descriptions of their layouts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

Layout = Callable[..., Path]
MPP = 0.2465


def trident(root: Path, name: str, features: Any, coords: Any) -> Path:
    path = root / "features_uni_v1" / f"{name}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        rows = file.create_dataset("features", data=features, chunks=(1, features.shape[1]))
        rows.attrs.update({"name": name, "savetodir": "/somewhere", "encoder": "uni_v1"})
        corners = file.create_dataset(
            "coords", data=coords.astype(np.int64), chunks=(1, 2), maxshape=(None, 2)
        )
        corners.attrs.update(
            {
                "patch_size": 256,
                "patch_size_level0": 512,
                "level0_magnification": 40,
                "target_magnification": 20,
                "overlap": 0,
                "name": name,
                "savetodir": "None",
                "level0_width": 90_000,
                "level0_height": 80_000,
            }
        )
    return path


def clam(root: Path, name: str, features: Any, coords: Any) -> Path:
    for folder in ("h5_files", "pt_files", "patches"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    path = root / "h5_files" / f"{name}.h5"
    with h5py.File(path, "w") as file:
        chunks = (32, features.shape[1])
        rows = file.create_dataset(
            "features", features.shape, "f4", chunks=chunks, maxshape=(None, features.shape[1])
        )
        rows[:] = features
        file.create_dataset("coords", data=coords.astype(np.int32), chunks=(32, 2))
    torch.save(torch.from_numpy(features.astype(np.float32)), root / "pt_files" / f"{name}.pt")
    with h5py.File(root / "patches" / f"{name}.h5", "w") as file:
        corners = file.create_dataset("coords", data=coords.astype(np.int64), chunks=(1, 2))
        corners.attrs.update(
            {
                "patch_size": 256,
                "patch_level": 1,
                "downsample": (4.0001, 4.0001),
                "downsampled_level_dim": (22_500, 20_000),
                "level_dim": (22_500, 20_000),
                "name": name,
                "save_path": "/somewhere/patches",
            }
        )
    return path


def stamp(root: Path, name: str, features: Any, coords: Any) -> Path:
    path = root / f"{name}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["coords"] = (coords * MPP).astype(np.float32)
        file["feats"] = features.astype(np.float16)
        file.attrs.update(
            {
                "stamp_version": "2.5.0",
                "extractor": "ctranspath",
                "unit": "um",
                "tile_size_um": 256.0,
                "tile_size_px": 224,
                "code_hash": "0badcafe",
                "feat_type": "tile",
            }
        )
    return path


def atlaspatch(root: Path, name: str, features: Any, coords: Any) -> Path:
    path = root / "patches" / f"{name}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        boxes = np.c_[coords, np.full_like(coords, 512), np.zeros(len(coords))].astype(np.int32)
        file.create_dataset("coords", data=boxes, chunks=(8192, 5), maxshape=(None, 5))
        file["passports"] = np.full(len(coords), b"x", "S160")
        for encoder, values in (("resnet50", features), ("uni_v1", -features)):
            file.create_dataset(
                f"features/{encoder}", data=values.astype(np.float32), chunks=(32, values.shape[1])
            )
        file.attrs.update(
            {
                "patch_size": 256,
                "patch_size_level0": 512,
                "level0_magnification": 40,
                "target_magnification": 20,
                "overlap": 0,
                "level0_width": 90_000,
                "level0_height": 80_000,
                "wsi_path": "/somewhere/a.svs",
                "num_patches": len(coords),
                "mpp": 0.25,
                "vendor": "aperio",
            }
        )
    return path


def npy(root: Path, name: str, features: Any, coords: Any) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    np.save(root / f"{name}.npy", features)
    np.save(root / f"{name}.coords.npy", coords)
    return root / f"{name}.npy"


def pt(root: Path, name: str, features: Any, coords: Any) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    torch.save(torch.from_numpy(features), root / f"{name}.pt")
    np.save(root / f"{name}.coords.npy", coords)
    return root / f"{name}.pt"


def slide2vec(root: Path, name: str, features: Any, coords: Any, kind: str = "pt") -> Path:
    """As slide2vec 5 to 7 and hs2p 4 to 6 write: tensors or packed arrays, JSON beside both."""
    for folder in ("tile_embeddings", "tiles"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    path = root / "tile_embeddings" / f"{name}.{kind}"
    numbers = np.arange(len(features), dtype=np.int64)
    if kind == "pt":
        torch.save(torch.from_numpy(features), path)
    elif kind == "npz":
        np.savez_compressed(path, features=features, tile_index=numbers)
    x, y = coords.T.astype(np.int64)
    np.savez_compressed(
        root / "tiles" / f"{name}.coordinates.npz",
        tile_index=numbers.astype(np.int32),
        x=x,
        y=y,
        tissue_fractions=np.ones(len(x), np.float32),
    )
    meta = {
        "sample_id": name,
        "artifact_type": "tile_embeddings",
        "format": kind,
        "feature_dim": features.shape[1] if len(features) else None,
        "feature_dtype": "fp32",
        "num_tiles": len(features),
        "encoder_name": "uni2",
        "encoder_level": "tile",
        "coordinates_npz_path": f"/elsewhere/tiles/{name}.coordinates.npz",
        "coordinates_meta_path": f"/elsewhere/tiles/{name}.coordinates.meta.json",
        "tiles_tar_path": "",
        "image_path": f"/elsewhere/{name}.svs",
        "mask_path": None,
        "tile_size_lv0": 448,
        "backend": "cucim",
        "read_tile_size_px": 224,
        "requested_tile_size_px": 224,
        "encoder_input_size_px": 224,
        "requested_spacing_um": 0.5,
        "annotation": None,
    }
    (root / "tile_embeddings" / f"{name}.meta.json").write_text(json.dumps(meta, indent=2))
    about = {
        "provenance": {"sample_id": name, "backend": "cucim", "mask_path": None},
        "slide": {
            "dimensions": [110_000, 100_000],
            "base_spacing_um": 0.25,
            "level_downsamples": [1.0, 2.0, 4.0],
        },
        "tiling": {
            "requested_tile_size_px": 224,
            "requested_spacing_um": 0.5,
            "read_level": 1,
            "read_tile_size_px": 224,
            "read_spacing_um": 0.5,
            "tile_size_lv0": 448,
            "step_px_lv0": 448,
            "overlap": 0.0,
            "n_tiles": len(x),
        },
        "artifact": {"coordinate_space": "level0", "tile_order": "row_major", "annotation": None},
    }
    (root / "tiles" / f"{name}.coordinates.meta.json").write_text(json.dumps(about, indent=2))
    return path


LAYOUTS = {
    layout.__name__: layout for layout in (trident, clam, stamp, atlaspatch, npy, pt, slide2vec)
}


@pytest.fixture(scope="session")
def lay_out() -> Layout:
    """Writes one slide's file(s): (format, root, name, rows, dim) -> the file of features."""

    def write(
        source: str, root: Path, name: str, rows: int = 700, dim: int = 24, **more: Any
    ) -> Path:
        rng = np.random.default_rng([rows, dim, *name.encode()])
        features = rng.standard_normal((rows, dim), np.float32).astype(np.float16)
        coords = rng.integers(0, 200, (rows, 2)) * 512
        return LAYOUTS[source](root, name, features.astype(np.float32), coords, **more)

    return write
