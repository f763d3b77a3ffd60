"""What a commit promises: no file of the slide is missing, and all outlive a power cut."""

import os
from pathlib import Path

import numpy as np
import pytest

from hmil_fast.errors import StoreError
from hmil_fast.io.store import FeatureStore, StoreSpec, create_store
from hmil_fast.io.store.commit import publish

SPEC = StoreSpec(16, "float16", {"name": "toy"}, {"tile_px": 256, "mpp": 0.5})


def write(store: FeatureStore) -> None:
    with store.writer("s", 3, {}) as writer:
        writer.append(np.ones((3, 16), np.float16))
        writer.commit(np.zeros((3, 2), np.int32), np.zeros(3, np.uint8))


def test_files_that_vanish_during_the_commit_unpublish_it(tmp_path: Path) -> None:
    store = create_store(tmp_path / "store", SPEC)
    write(store)
    record, folder = store.record("s"), tmp_path / "store" / "slides" / "s"
    (folder / "commit.json").unlink()
    (folder / record.attempt / record.objects[0].key).unlink()  # swept away meanwhile
    with pytest.raises(StoreError, match="vanished while it was committed"):
        publish(folder, record)
    assert not (folder / "commit.json").exists()


def test_every_file_is_flushed_before_the_commit_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = create_store(tmp_path / "store", SPEC)
    flushed: set[Path] = set()
    fsync, commit = os.fsync, tmp_path / "store" / "slides" / "s" / "commit.json"

    def see(fd: int) -> None:
        if not commit.exists():
            flushed.add(Path(os.readlink(f"/proc/self/fd/{fd}")))  # noqa: PTH115
        fsync(fd)

    monkeypatch.setattr(os, "fsync", see)
    write(store)
    attempt = commit.parent / store.record("s").attempt
    assert {attempt, *attempt.rglob("*")} <= flushed
    assert {commit.parent, commit.parent.parent} <= flushed
