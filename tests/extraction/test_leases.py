"""Who may work on a slide: leases between real processes that stop, die and race."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hmil_fast.errors import SlideError
from hmil_fast.extraction.jobs.leases import MAX_DEATHS, Leases, held_by

Child = Callable[..., "subprocess.Popen[str]"]

HOLDER = """
import sys
from pathlib import Path
from hmil_fast.extraction.jobs.leases import Leases
leases = Leases(Path(sys.argv[1]), float(sys.argv[2]), lambda: None)
print(*[slide for slide in sys.argv[3:] if leases.take(slide)], flush=True)
sys.stdin.readline()
leases.close()
"""
RACER = """
import sys
from pathlib import Path
from hmil_fast.extraction.jobs.leases import Leases
leases = Leases(Path(sys.argv[1]), 60.0, lambda: None)
print("ready", flush=True)
sys.stdin.readline()
print(*[slide for slide in sys.argv[2:] if leases.take(slide)], flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def child() -> Iterator[Child]:
    running = []

    def begin(script: str, *args: object) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", script, *map(str, args)]
        pipe = subprocess.PIPE
        running.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def line(process: "subprocess.Popen[str]") -> list[str]:
    assert process.stdout is not None
    return process.stdout.readline().split()


def say(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def leases_of(store: Path, seconds: float = 60.0) -> Leases:
    return Leases(store, seconds, lambda: None)


def names(store: Path) -> list[str]:
    return sorted(path.name for path in (store / "leases").iterdir())


def test_one_holds_and_gives_back(tmp_path: Path) -> None:
    one, two = leases_of(tmp_path), leases_of(tmp_path)
    lease = one.take("a/b")
    assert lease is not None
    assert lease.deaths == 0
    assert names(tmp_path) == ["a%2Fb.0"]
    assert two.take("a/b") is None
    assert two.take("c") is not None
    assert held_by(tmp_path, os.getpid()) == ["a/b", "c"]
    one.release("a/b")
    one.release("c")  # not its own
    assert two.take("a/b") is not None
    two.close()
    assert names(tmp_path) == []


def test_a_stopped_process_is_succeeded_after_its_time_only(tmp_path: Path, child: Child) -> None:
    holder = child(HOLDER, tmp_path, 4.0, "s")
    assert line(holder) == ["s"]
    mine = leases_of(tmp_path, 0.1)
    until = time.monotonic() + 5
    while time.monotonic() < until:  # it is touched, so it lives on beyond its time
        assert mine.take("s") is None
        time.sleep(0.05)
    holder.send_signal(signal.SIGSTOP)
    assert mine.take("s") is None
    until = time.monotonic() + 600
    while (lease := mine.take("s")) is None:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert lease.deaths == 1
    assert mine.take("s", fresh=True) is None
    holder.send_signal(signal.SIGCONT)
    say(holder)
    assert holder.wait(600) == 0
    assert names(tmp_path) == ["s.1"]  # the one that came back gives back its own alone
    assert leases_of(tmp_path).take("s") is None
    mine.close()
    assert names(tmp_path) == []


def test_of_many_takers_one_succeeds_the_dead(tmp_path: Path, child: Child) -> None:
    slides = [f"s{number}" for number in range(60)]
    dead = child(HOLDER, tmp_path, 60.0, *slides)
    assert line(dead) == slides
    dead.kill()
    dead.wait()
    racers = [child(RACER, tmp_path, *slides) for _ in range(3)]
    for racer in racers:
        assert line(racer) == ["ready"]
    for racer in racers:
        say(racer)
    won = [slide for racer in racers for slide in line(racer)]
    assert sorted(won) == sorted(slides)


def test_a_slide_that_kills_is_given_up_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "leases"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "one").mkdir()
    leases_of(tmp_path / "one").take("s")
    text = json.loads((tmp_path / "one" / "leases" / "s.0").read_text())
    folder.mkdir()
    for deaths in range(MAX_DEATHS):
        (folder / f"s.{deaths}").write_text(json.dumps({**text, "pid": dead.pid}))
        mine = leases_of(tmp_path)
        if deaths < MAX_DEATHS - 1:
            taken = mine.take("s")
            assert taken is not None
            assert taken.deaths == deaths + 1
            taken.path.unlink()
    with pytest.raises(SlideError, match=f"3 processes died.* process {dead.pid} on") as error:
        mine.take("s")
    assert "doctor" in error.value.fix
    assert "--retry-failed" in error.value.fix


@pytest.mark.parametrize("text", ["", "[]", "{", '{"pid": "x", "seconds": "y", "machine": 3}'])
def test_a_damaged_lease_is_waited_out(tmp_path: Path, text: str) -> None:
    mine = leases_of(tmp_path, 0.2)
    (tmp_path / "leases" / "s.0").write_text(text)
    assert mine.take("s") is None
    time.sleep(0.3)
    assert mine.take("s") is not None
