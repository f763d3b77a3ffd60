"""Pruning and packing of wheels, on small made files."""

import struct
import subprocess
from pathlib import Path

import numpy as np

from bench.pack_wheels import blank_other_code, pack, prune, unpack_line


def fatbin(*codes: tuple[int, int, bytes]) -> bytes:
    """A fat binary of codes (kind, architecture, bytes)."""
    body = b""
    for kind, arch, code in codes:
        header = struct.pack("<HHIQ", kind, 1, 64, len(code)) + bytes(12) + struct.pack("<I", arch)
        body += header.ljust(64, b"\0") + code
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_code_of_other_architectures_is_blanked() -> None:
    ours, other, ptx = b"o" * 100, b"x" * 300, b"p" * 50
    head, tail = b"\x7fELF" + bytes(100), b"tail of the library"
    both = fatbin((2, 90, ours), (2, 80, other), (1, 90, ptx))
    only_ptx = fatbin((1, 80, ptx), (2, 80, other))
    data = head + both + b"between" + only_ptx + tail
    kept, blanked = blank_other_code(data, 90)
    assert len(kept) == len(data)
    assert blanked == 350
    assert kept.count(b"o") == data.count(b"o")
    assert other in kept[kept.index(b"between") :], "nothing is for sm_90 there: it stays whole"
    assert other not in kept[: kept.index(b"between")]
    assert kept.endswith(tail)
    assert blank_other_code(head + tail, 90) == (head + tail, 0)
    cut_off = data[: len(head) + 120]
    assert blank_other_code(cut_off, 90) == (cut_off, 0)


def test_modules_of_other_pythons_go(tmp_path: Path) -> None:
    for name in ("a.cpython-312-x86_64-linux-gnu.so", "a.cpython-310-x86_64-linux-gnu.so",
                 "a.abi3.so", "b.py", "impl_py311.so"):  # fmt: skip
        (tmp_path / name).write_bytes(b"12345")
    assert prune(tmp_path, 90) == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.abi3.so", "a.cpython-312-x86_64-linux-gnu.so", "b.py",
    ]  # fmt: skip


def test_pieces_unpack_by_the_line_that_is_printed(tmp_path: Path) -> None:
    tree, carried = tmp_path / "tree", tmp_path / "carried"
    (tree / "package").mkdir(parents=True)
    carried.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, 25_000, np.uint8).tobytes()
    (tree / "package" / "data.bin").write_bytes(noise)
    (carried / "base.tar.xz.09").write_text("of an earlier try")
    pieces = pack(tree, carried / "base.tar.xz", piece=10_000)
    assert len(pieces) == 3
    assert sorted(carried.iterdir()) == pieces
    assert all(piece.stat().st_size <= 10_000 for piece in pieces)
    subprocess.run(["/bin/sh", "-c", unpack_line("base")], cwd=carried, check=True)
    assert (carried / ".carry" / "package" / "data.bin").read_bytes() == noise
