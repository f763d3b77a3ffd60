"""A folder of `<slide>.pt`, each a tensor (N, D); never loaded in a way that could run code."""

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hmil_fast.errors import HmilError
from hmil_fast.io.interchange import npy
from hmil_fast.io.interchange.bag import (
    Bag,
    Hints,
    as_rows,
    check_shape,
    convert,
    refuse,
    target_dtype,
)
from hmil_fast.io.interchange.outgoing import Outgoing, Part, same_bag
from hmil_fast.io.store.layout import STORED_AS

_SAVE_AGAIN = "Load it with torch, and save the tensor (N, D) alone with torch.save."


def _load(path: Path) -> Any:
    """The mapped tensor of a file, no larger than the file is."""
    import torch

    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
        size = path.stat().st_size
        if any(i.compress_type for i in infos) or sum(i.file_size for i in infos) > size:
            raise refuse(path, "is packed, which torch.save does not do", _SAVE_AGAIN)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except zipfile.BadZipFile as error:
        raise refuse(
            path, "is not a file of torch.save since 1.6, or damaged", _SAVE_AGAIN
        ) from error
    except HmilError:
        raise
    except Exception as error:  # whatever the parser of a foreign file raises
        why = (str(error).splitlines() or [""])[0][:200]
        raise refuse(path, f"torch refuses it: {why}", _SAVE_AGAIN) from error
    if not isinstance(found, torch.Tensor) or found.layout != torch.strided:
        raise refuse(path, f"holds a {type(found).__name__}, not a tensor", _SAVE_AGAIN)
    # strides of 0 make a tensor of terabytes out of four bytes
    if math.prod(found.shape) * found.element_size() > size:
        raise refuse(path, f"claims {tuple(found.shape)}, the file is {size:,} bytes", _SAVE_AGAIN)
    return found


@contextmanager
def read(path: Path, slide_id: str, hints: Hints) -> Iterator[Bag]:
    """Open one slide's features; bfloat16 stays what it is."""
    import torch

    tensor = _load(path).detach()
    shape = check_shape(path, tuple(tensor.shape))
    tensor = tensor.reshape(as_rows(tuple(tensor.shape)))
    if tensor.dtype == torch.bfloat16 and hints.dtype is None:
        dtype, bits = "bfloat16", tensor.view(torch.uint16).numpy()
    else:
        wide = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        bits = wide.numpy()
        dtype = target_dtype(path, bits.dtype, hints)
    coords, tiles = npy.beside(path, shape[0], hints)
    yield Bag(
        shape,
        dtype,
        lambda start, stop: convert(path, bits[start:stop], dtype),
        **npy.about("pt", slide_id, hints, coords, tiles),
    )


def part(path: Path, slide: Outgoing) -> Part:
    """The file of a slide's features; they are in memory while it is written."""

    def write(to: Path) -> None:
        import torch

        rows: npt.NDArray[Any] = np.empty(slide.bag.shape, STORED_AS[slide.bag.dtype])
        start = 0
        for block in slide.bag.blocks():
            rows[start : start + len(block)] = block
            start += len(block)
        try:
            with to.open("xb") as file:
                torch.save(torch.from_numpy(rows), file)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(str(error)[:200]) from error

    def same(found: Path, hints: Hints) -> bool:
        with read(found, slide.slide_id, hints) as there:
            return same_bag(slide.bag, there)

    return Part(path, write, same)


def parts(folder: Path, slide: Outgoing) -> list[Part]:
    """The files to write, coordinates first."""
    return [*npy.coords_part(folder, slide), part(folder / f"{slide.name}.pt", slide)]
