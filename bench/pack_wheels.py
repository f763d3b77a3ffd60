"""Pack what a GPU machine without a network lacks, in pieces small enough to be carried there.

    python -m bench.pack_wheels FOLDER

downloads wheels of Python 3.12 by pip, unpacks and prunes them, and writes into FOLDER a tar.xz for
each group of packages, cut into pieces. It ends with the line that unpacks them over there.
"""

import argparse
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

PIECE = 40 * 10**6  # bytes
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux2014_x86_64")
# a machine with torch, triton, numpy, timm, tifffile, scikit-image and h5py lacks these
GROUPS = {
    "base": (
        "zarr", "numcodecs", "donfig", "google-crc32c", "openslide-bin", "openslide-python",
        "pydicom", "simplejpeg", "pytest-benchmark", "py-cpuinfo", "nvidia-nvimgcodec-cu13",
        "nvidia-nvjpeg", "nvidia-nvjpeg2k-cu13",
    ),
    "dali": (
        "nvidia-dali-cuda130", "astunparse", "gast", "six", "optree", "nvtx", "makefun", "libcst",
    ),
}  # fmt: skip
_OTHER_PYTHON = re.compile(r"\.cpython-3(?!12)\d+-|(?:^|_)(?:py|cp)3(?!12)\d+[._]")
_FATBIN = b"\x50\xed\x55\xba"
_SASS = 2  # kind of an entry: machine code; others are PTX


def main() -> int:
    """Download, prune, pack."""
    parser = argparse.ArgumentParser(prog="python -m bench.pack_wheels", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--arch", type=int, default=90, help="keep device code of it (default: 90)")
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--also", nargs="*", default=[], metavar="PACKAGE", help="more, in base")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for group in args.groups:
        names = [*GROUPS[group], *(args.also if group == "base" else [])]
        with tempfile.TemporaryDirectory() as work:
            tree = Path(work) / "tree"
            for wheel in download(names, Path(work) / "wheels"):
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(tree)  # noqa: S202  # wheels that pip has checked
            saved = prune(tree, args.arch)
            pieces = pack(tree, args.folder / f"{group}.tar.xz")
        size = sum(piece.stat().st_size for piece in pieces)
        print(f"{group}: {len(pieces)} pieces, {size / 1e6:.1f} MB, {saved / 1e6:.0f} MB pruned")
        print(f"  there: {unpack_line(group)}")
    return 0


def unpack_line(group: str) -> str:
    """The command that unpacks a group, in the folder of its pieces; PYTHONPATH gets .carry."""
    return f"mkdir -p .carry && cat {group}.tar.xz.* | tar -xJ -C .carry"


def download(names: list[str], folder: Path) -> list[Path]:
    """Fetch the wheels of packages, without what they depend on, from pip's index."""
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
        "--python-version", PYTHON, *platforms, "--dest", str(folder), *names,
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return sorted(folder.glob("*.whl"))


def prune(tree: Path, arch: int) -> int:
    """Delete modules of other Pythons, blank device code of other architectures; bytes saved."""
    saved = 0
    for path in sorted(tree.rglob("*")):
        if not path.is_file():
            continue
        size = path.stat().st_size
        if _OTHER_PYTHON.search(path.name):
            saved += size
            path.unlink()
        elif ".so" in path.suffixes or path.suffix == ".so":
            data = path.read_bytes()
            kept, blanked = blank_other_code(data, arch)
            if blanked:
                saved += blanked
                path.write_bytes(kept)
    for folder in list(tree.rglob("__pycache__")):
        shutil.rmtree(folder)
    return saved


def blank_other_code(data: bytes, arch: int) -> tuple[bytes, int]:
    """A library with zeros for other architectures' device code, and how many bytes these are.

    A fat binary that holds no machine code for `arch` stays whole: a driver may need its PTX.
    """
    new, blanked, at = bytearray(data), 0, data.find(_FATBIN)
    while at >= 0:
        entries = list(_entries(data, at))
        if any((kind, code) == (_SASS, arch) for _, _, kind, code in entries):
            for start, size, kind, code in entries:
                if (kind, code) != (_SASS, arch):
                    new[start : start + size] = bytes(size)
                    blanked += size
        at = data.find(_FATBIN, at + 4)
    return bytes(new), blanked


def _entries(data: bytes, at: int) -> Iterator[tuple[int, int, int, int]]:
    """Start, size, kind and architecture of the codes in the fat binary at a place."""
    if at + 16 > len(data):
        return
    _, _, header, size = struct.unpack_from("<IHHQ", data, at)
    place, end = at + header, at + header + size
    if header != 16 or end > len(data):
        return
    while place < end - 40:
        kind, _, own, length = struct.unpack_from("<HHIQ", data, place)
        (arch,) = struct.unpack_from("<I", data, place + 28)
        if not 40 <= own <= 200 or place + own + length > end:
            return
        yield place + own, length, kind, arch
        place += own + length


def pack(tree: Path, target: Path, piece: int = PIECE) -> list[Path]:
    """Write a folder as TARGET.00, TARGET.01 …: one tar.xz, cut into pieces of so many bytes."""
    for old in target.parent.glob(f"{target.name}.*"):
        old.unlink()
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        whole = Path(folder) / "whole"
        with tarfile.open(whole, "w:xz", preset=6) as archive:
            for entry in sorted(tree.iterdir()):
                archive.add(entry, entry.name)
        pieces = []
        with whole.open("rb") as file:
            while part := file.read(piece):
                pieces.append(target.with_name(f"{target.name}.{len(pieces):02}"))
                pieces[-1].write_bytes(part)
    return pieces


if __name__ == "__main__":
    sys.exit(main())
