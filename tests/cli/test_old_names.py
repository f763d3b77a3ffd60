"""Options that version 0.1.0 called otherwise still work, hidden, and say their new name."""

from collections.abc import Callable
from pathlib import Path

import pytest

from hmil_fast.cli.main import main

OLD = [
    (("doctor", "x.svs"), ("--tile", "64"), "--tile-size"),
    (("extract", "x.svs", "--store", "s"), ("--tile", "64"), "--tile-size"),
    (("extract", "x.svs", "--store", "s"), ("--batch", "8"), "--batch-size"),
    (("evaluate", "run"), ("--risk", "0.2"), "--alpha"),
    (("predict", "run", "--store", "s"), ("--risk", "0.2"), "--alpha"),
    (("compare", "run", "other"), ("--draws", "100"), "--resamples"),
    (("report", "run"), ("--overwrite",), "--allow-missing"),
]


@pytest.mark.parametrize(("command", "old", "new"), OLD)
def test_an_old_name_is_taken_and_the_new_one_named(
    command: tuple[str, ...],
    old: tuple[str, ...],
    new: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    main([*command, *old])  # there is no such slide and no such run
    err = capsys.readouterr().err
    assert err.count(f"note: {old[0]} is now called {new}\n") == 1
    assert "unrecognized" not in err
    with pytest.raises(SystemExit):
        main([command[0], "--help"])
    text = capsys.readouterr().out
    assert f"{new} " in text or f"{new}\n" in text
    assert f" {old[0]} " not in text


def test_both_names_of_an_option_do_the_same(
    slide_file: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    slide = str(slide_file("cmu1_small_pyramid.tif"))
    answers = []
    for option in ("--tile", "--tile-size"):
        assert main(["doctor", slide, option, "128", "--mpp", "1"]) == 0
        line = next(x for x in capsys.readouterr().out.splitlines() if "cmu1_small_pyramid" in x)
        answers.append(line.partition(", about")[0])
    assert answers[0] == answers[1]
    assert "51 tiles" in answers[0]


def test_an_unknown_option_shows_the_usage_of_its_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["predict", "run", "--store", "s", "--alfa", "0.1"])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("usage: hmil-fast predict ")
    assert "unrecognized arguments: --alfa" in err
