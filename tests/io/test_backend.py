"""What the store relies on in a place to lie in; every backend must pass all of it."""

import copy
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr

from hmil_fast.errors import StoreError
from hmil_fast.io.store.backend import backend_of
from hmil_fast.io.store.location import Location, location
from hmil_fast.io.store.protocol import Backend

ODD_NAMES = ("µ [red]", "a%2Fb", "100% ?#&+", "~", "quote'\"", ".hidden", "-x", "日本語", "x" * 200)
LIMIT = 2**20

RACER = """
import sys
from hmil_fast.io.store.backend import backend_of
from hmil_fast.io.store.location import location
folder, me = location(sys.argv[1]), sys.argv[2]
backend = backend_of(folder)
print("ready", flush=True)
for name in sys.argv[3:]:
    sys.stdin.readline()
    print(int(backend.create_exclusive(folder / name, me.encode() * 100_000)), flush=True)
"""


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """A place of each kind that nothing was written to yet; add a new backend's here."""
    if request.param == "local":
        folder = tmp_path / "of µ"
        folder.mkdir()
        return folder
    return location(request.getfixturevalue("s3"))


@pytest.fixture
def backend(place: Location) -> Backend[Any]:
    return backend_of(place)


def put(backend: Backend[Any], path: Location, data: bytes = b"x") -> None:
    backend.make_folder(path.parent)
    backend.replace(path, data)


def test_it_can_be_reached_and_shared(place: Location, backend: Backend[Any]) -> None:
    backend.check(place, writing=True)
    backend.check(place, writing=False)
    assert vars(copy.deepcopy(backend)) == {}  # no state, so threads and processes may share it
    assert backend.names(place) == []
    assert backend.poll_s > 0
    free = backend.free_bytes(place / "of" / "the future")
    assert free is None or free > 0


def test_a_file_that_is_created_is_whole_and_stays(place: Location, backend: Backend[Any]) -> None:
    assert backend.create_exclusive(place / "a", b"first")
    assert not backend.create_exclusive(place / "a", b"second")
    assert backend.read_bytes(place / "a", LIMIT) == b"first"
    assert backend.create_exclusive(place / "b", b"", lasting=False)
    assert not backend.create_exclusive(place / "b", b"more", lasting=False)
    assert backend.read_bytes(place / "b", LIMIT) == b""
    assert backend.names(place) == ["a", "b"]


def test_of_many_processes_that_create_a_file_one_does(
    place: Location, backend: Backend[Any]
) -> None:
    names = [f"n{number}" for number in range(20)]
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(place), mark, *names],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        for mark in "abc"
    ]
    try:
        assert [racer.stdout and racer.stdout.readline() for racer in racers] == ["ready\n"] * 3
        for name in names:
            for racer in racers:
                assert racer.stdin
                racer.stdin.write("\n")
            won = [racer.stdout and racer.stdout.readline() for racer in racers]
            assert sorted(won) == ["0\n", "0\n", "1\n"]
            winner = "abc"[won.index("1\n")].encode()
            assert backend.read_bytes(place / name, LIMIT) == winner * 100_000
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
    assert backend.names(place) == sorted(names)


def test_readers_see_the_old_file_or_the_new_one(place: Location, backend: Backend[Any]) -> None:
    path = place / "f"
    backend.replace(path, b"0" * 300_000)
    stop, torn, reads = threading.Event(), list[bytes](), [0]

    def read() -> None:
        while not stop.is_set():
            data = backend.read_bytes(path, LIMIT)
            reads[0] += 1
            if len(data) != 300_000 or len(set(data)) != 1:
                torn.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(60):
        backend.replace(path, b"%d" % (number % 10) * 300_000)
    while not reads[0]:
        pass
    stop.set()
    reader.join()
    assert torn == []
    assert backend.names(place) == ["f"]


def test_a_write_that_cannot_be_done_leaves_nothing(place: Location, backend: Backend[Any]) -> None:
    put(backend, place / "file" / "below")
    for write in (backend.replace, backend.create_exclusive):
        with suppress(OSError):  # an object store has room for both
            write(place / "file", b"x")
    assert set(backend.names(place)) <= {"file"}
    assert backend.read_bytes(place / "file" / "below", LIMIT) == b"x"


def test_a_file_is_appended_to_or_left(place: Location, backend: Backend[Any]) -> None:
    can = backend.append(place / "log", b"one\n")
    assert backend.append(place / "log", b"two\n") is can
    assert backend.exists(place / "log") is can
    if can:
        assert backend.read_bytes(place / "log", LIMIT) == b"one\ntwo\n"


def test_folders_are_listed(place: Location, backend: Backend[Any]) -> None:
    slides = place / "slides"
    for key, data in (("b/commit", b"1"), ("b/x/c/0", b"22"), ("a/x/commit", b"333"), ("f", b"")):
        put(backend, slides.joinpath(key) if isinstance(slides, Path) else slides / key, data)
    assert backend.names(slides) == ["a", "b", "f"]
    assert backend.tree(slides) == {"b/commit": 1, "b/x/c/0": 2, "a/x/commit": 3, "f": 0}
    assert backend.tree(slides / "b" / "x") == {"c/0": 2}
    assert backend.folders_with(slides, "commit") == ["b"]
    assert list(backend.stamps(slides)) == ["f"]
    assert backend.sizes(slides, ["b/x/c/0", "f"]) == {"b/x/c/0": 2, "f": 0}
    put(backend, place / "slides-old" / "z")  # a prefix of characters, not of folders
    assert sorted(backend.tree(slides)) == ["a/x/commit", "b/commit", "b/x/c/0", "f"]


def test_more_files_than_a_page_of_a_listing(place: Location, backend: Backend[Any]) -> None:
    wanted = [f"{number:04}" for number in range(1003)]
    backend.make_folder(place / "many")
    list(backend.map(lambda name: backend.replace(place / "many" / name, b"x"), wanted))
    assert backend.names(place / "many") == wanted
    assert sorted(backend.stamps(place / "many")) == wanted
    assert len(backend.tree(place / "many")) == 1003


def test_what_is_not_there(place: Location, backend: Backend[Any]) -> None:
    nowhere = place / "no" / "where"
    assert not backend.exists(nowhere)
    assert not backend.is_link(nowhere)
    assert backend.names(nowhere) == []
    assert backend.stamps(nowhere) == {}
    assert backend.tree(nowhere) == {}
    assert backend.folders_with(nowhere, "f") == []
    backend.remove(nowhere)
    backend.unlink(nowhere)
    backend.discard(nowhere)
    backend.make_folder(place / "there")
    for read in (
        lambda: backend.read_stamped(nowhere, LIMIT),
        lambda: backend.read_bytes(nowhere, LIMIT),
        lambda: backend.crc32c_of(nowhere),
        lambda: backend.newest_change(nowhere),
        lambda: backend.sizes(place / "there", ["f"]),
        lambda: backend.rename(nowhere, "f"),
        lambda: _open(backend, nowhere),
    ):
        with pytest.raises(FileNotFoundError):
            read()


def _open(backend: Backend[Any], path: Location) -> None:
    with backend.open_read(path) as file:
        file.read_into(0, [np.empty(1, np.uint8)])


def test_a_small_file_has_a_limit(place: Location, backend: Backend[Any]) -> None:
    put(backend, place / "f", b"12345")
    assert backend.read_stamped(place / "f", 5)[0] == b"12345"
    with pytest.raises(StoreError, match="more than the 4 allowed"):
        backend.read_bytes(place / "f", 4)


def test_ranges(place: Location, backend: Backend[Any]) -> None:
    data = np.random.default_rng(0).integers(0, 256, 20 * 2**20 + 7, np.uint8)  # over one request
    put(backend, place / "f", data.tobytes())
    for size in (None, len(data)):
        with backend.open_read(place / "f", size) as file:
            assert file.size == len(data)
            two = [np.empty(1000, np.uint8), np.empty((3, 5), np.uint8)]
            file.read_into(123, two)
            assert np.concatenate([b.ravel() for b in two]).tobytes() == data[123:1138].tobytes()
            starts = [0, 5, 9_000_000, 19_000_000, 17]
            runs = [(at, [np.empty(1_000_003, np.uint8)]) for at in starts]
            read = [b.copy() for (b,) in file.read_runs(runs)]
            for at, got in zip(starts, read, strict=True):
                np.testing.assert_array_equal(got, data[at : at + 1_000_003])
            for at in (len(data) - 1, len(data) + 5):
                with pytest.raises((EOFError, OSError)):
                    file.read_into(at, [np.empty(2, np.uint8)])
    assert backend.crc32c_of(place / "f") == google_crc32c.value(data.tobytes())


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_of_odd_characters(place: Location, backend: Backend[Any], name: str) -> None:
    folder = place / name
    put(backend, folder / name, b"1")
    assert backend.names(place) == [name]
    assert backend.names(folder) == [name]
    assert backend.tree(folder) == {name: 1}
    assert list(backend.stamps(folder)) == [name]
    assert backend.folders_with(place, name) == [name]
    assert not backend.create_exclusive(folder / name, b"2")
    assert backend.read_bytes(folder / name, LIMIT) == b"1"
    backend.rename(folder / name, f"{name}.old"[-200:])
    assert backend.names(folder) == [f"{name}.old"[-200:]]
    backend.remove(folder)
    assert backend.names(place) == []


def test_what_is_deleted_and_what_stays(place: Location, backend: Backend[Any]) -> None:
    for folder in ("a", "ab"):
        put(backend, place / folder / "x" / "f")
        put(backend, place / folder / "g")
    backend.unlink(place / "a" / "g")
    assert backend.tree(place / "a") == {"x/f": 1}
    backend.remove(place / "a")
    assert not backend.tree(place / "a")
    assert backend.tree(place / "ab") == {"x/f": 1, "g": 1}
    backend.remove(place / "ab" / "g")
    assert backend.tree(place / "ab") == {"x/f": 1}


def test_a_stamp_tells_every_write(place: Location, backend: Backend[Any]) -> None:
    path = place / "leases" / "f"
    put(backend, path, b"1")
    data, first = backend.read_stamped(path, LIMIT)
    assert data == b"1"
    assert backend.read_stamped(path, LIMIT)[1].tag == first.tag
    assert backend.stamps(path.parent)["f"].tag == first.tag
    backend.renew(path, first, b"2")
    _, second = backend.read_stamped(path, LIMIT)
    assert second.tag != first.tag
    assert second.time >= first.time
    assert backend.newest_change(path.parent) >= second.time - 1
    backend.unlink(path)
    with suppress(OSError):
        backend.renew(path, second, b"3")
    assert not backend.exists(path)  # a lease that was given back stays so


def test_a_renamed_file_has_the_time_of_now(place: Location, backend: Backend[Any]) -> None:
    put(backend, place / "f", b"1")
    if isinstance(place, Path):
        os.utime(place / "f", (1, 1))
    backend.rename(place / "f", "g")
    assert backend.names(place) == ["g"]
    assert backend.stamps(place)["g"].time > 10**9


def test_items_come_in_their_order(place: Location, backend: Backend[Any]) -> None:
    assert list(backend.map(lambda n: n * n, range(50))) == [n * n for n in range(50)]
    with pytest.raises(ZeroDivisionError):
        list(backend.map(lambda n: 1 // n, [1, 0]))


def test_an_attempt_is_staged_finished_and_discarded(
    place: Location, backend: Backend[Any]
) -> None:
    wanted = {"zarr.json": b"{}", "features/c/0/0": b"0" * 1000}
    attempts = [place / "slides" / "s" / f"a-{uuid.uuid4().hex}.zarr" for _ in range(2)]
    for attempt in attempts:
        folder = backend.staging(attempt)
        backend.make_staging(attempt)
        for key, data in wanted.items():
            (folder / key).parent.mkdir(parents=True, exist_ok=True)
            (folder / key).write_bytes(data)
        with pytest.raises(FileExistsError):
            folder.mkdir()
    backend.finish(attempts[0])
    assert backend.tree(attempts[0]) == {key: len(data) for key, data in wanted.items()}
    for key, data in wanted.items():
        assert backend.read_bytes(attempts[0] / key, LIMIT) == data
    for attempt in attempts:
        backend.discard(attempt)
        assert backend.tree(attempt) == {}
        assert not backend.staging(attempt).exists()


def test_arrays_are_read_by_zarr(place: Location, backend: Backend[Any], tmp_path: Path) -> None:
    values = np.arange(60, dtype=np.int32).reshape(20, 3)
    array = zarr.create_array(tmp_path / "here" / "x", shape=(20, 3), chunks=(8, 3), dtype="int32")
    array[:] = values
    for file in (tmp_path / "here").rglob("*"):
        if file.is_file():
            path = place / "group"
            for part in file.relative_to(tmp_path / "here").parts:
                path = path / part
            put(backend, path, file.read_bytes())
    read = backend.read_zarr(place / "group", "x", slice(5, 17))
    np.testing.assert_array_equal(read, values[5:17])


def test_an_error_names_the_place_and_a_fix(place: Location, backend: Backend[Any]) -> None:
    with pytest.raises(FileNotFoundError) as reason:
        backend.read_bytes(place / "f", LIMIT)
    error = backend.failed(reason.value, "reading the commit", place / "f")
    assert error.what.startswith(f"reading the commit failed at {place / 'f'}: ")
    assert error.fix


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "f").write_bytes(b"1")
    yield folder
    assert (folder / "f").read_bytes() == b"1"


def test_links_lead_nowhere(tmp_path: Path, outside: Path) -> None:
    """Only a disk has links: they are told, not followed."""
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / "folder").symlink_to(outside)
    (folder / "file").symlink_to(outside / "f")
    backend = backend_of(folder)
    assert backend.is_link(folder / "folder")
    for key in ("file", "folder/f"):
        with pytest.raises(OSError, match=r"link|leads out"):
            backend.sizes(folder, [key])
    with pytest.raises(OSError, match="symbolic links"):
        backend.read_bytes(folder / "file", LIMIT)
    backend.remove(folder / "folder")
    backend.remove(folder / "file")
    assert backend.names(folder) == []
