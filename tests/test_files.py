"""Files that are written whole: what readers, other writers and killed processes see."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hmil_fast.files import create_file, sweep_partials, write_file, write_text
from hmil_fast.runs.checkpoint import save_checkpoint


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "µ.json"
    write_text(path, "one\n")
    old = path.open("rb")
    write_text(path, "µ\n")
    assert path.read_bytes() == b"\xc2\xb5\n"
    assert old.read() == b"one\n"  # who has it open reads on
    assert names(tmp_path) == ["µ.json"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_open(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "text", "x")
        save_checkpoint(tmp_path / "checkpoint", torch.nn.Linear(2, 2), {})
        create_file(tmp_path / "created", lambda to: to.write_bytes(b"x"))
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {0o666 & ~umask}


@pytest.mark.parametrize("error", [OSError(28, "no space"), KeyboardInterrupt(), ValueError()])
def test_an_error_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: BaseException
) -> None:
    def fail(to: Path) -> None:
        to.write_bytes(b"half")
        raise error

    path = tmp_path / "f"
    write_text(path, "old")
    for write in (write_file, create_file):
        with pytest.raises(type(error)):
            write(path, fail)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["f"]


def test_a_file_is_created_once(tmp_path: Path) -> None:
    path = tmp_path / "f"
    assert create_file(path, lambda to: to.write_bytes(b"one"))
    assert not create_file(path, lambda to: to.write_bytes(b"two"))
    assert path.read_bytes() == b"one"
    assert path.stat().st_nlink == 1
    assert names(tmp_path) == ["f"]


def test_what_a_killed_process_leaves_is_swept(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom hmil_fast.files import write_file\n"
        "def write(to):\n    to.write_bytes(b'half')\n    os.kill(os.getpid(), 9)\n"
        "write_file(Path(sys.argv[1]), write)\n"
    )
    write_text(tmp_path / "f", "old")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "f")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 2
    sweep_partials(tmp_path)
    assert names(tmp_path) == ["f"]
    assert (tmp_path / "f").read_text() == "old"


def test_file_and_folder_are_flushed_before_and_after_the_rename(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom hmil_fast.files import write_file\n"
        "def see(event, args):\n"
        "    if event in ('os.rename', 'os.link'): print('move', flush=True)\n"
        "sys.addaudithook(see)\nfsync = os.fsync\n"
        "def flush(fd):\n    print('folder' if os.path.isdir(f'/proc/self/fd/{fd}') else 'file',"
        " flush=True)\n    fsync(fd)\n"
        "os.fsync = flush\n"
        "write_file(Path(sys.argv[1]), lambda to: to.write_bytes(b'x'), lasting=sys.argv[2] == '1')"
    )
    for lasting, wanted in (("1", ["file", "move", "folder"]), ("0", ["move"])):
        command = [sys.executable, "-c", code, str(tmp_path / "f"), lasting]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert done.stdout.split() == wanted
