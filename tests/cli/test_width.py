"""Tables and progress in a terminal of 80 columns, which many are."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hmil_fast.cli.job_bar import JobBar
from hmil_fast.cli.main import main
from hmil_fast.extraction.jobs.messages import JobStarted, TilesDone
from hmil_fast.extraction.slides import SlideTask


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "compare"])
def test_tables_fit_80_columns(
    command: str,
    run: Any,
    cohort: Any,
    settings: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    args = {
        "train": ["train", *cohort.arguments, "--out", str(run.path), *settings],
        "compare": ["compare", str(run.path), str(run.path / "baseline")],
    }
    assert main(args[command]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if re.search(r"\d\.\d{3}", line)]
    assert len(table) > 6
    assert max(map(len, table)) <= 80
    assert not any("…" in line for line in table)  # nothing is cut off
    assert all(line.count("[") == line.count("]") for line in table)  # nor parted
    (line,) = (line for line in table if "leaf balanced accuracy" in line)
    assert line.count("0.") >= 2


def test_the_progress_of_a_job_fits_80_columns(tmp_path: Path) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, color_system=None)
    path = tmp_path / "s.tif"
    path.write_bytes(b"x" * 1000)
    with JobBar(console) as bar:
        bar.update(JobStarted([SlideTask(f"s{i}", path) for i in range(1234)]))
        bar.update(TilesDone("s0", 100, 50_000))
        bar._bar.refresh()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    line = next(line for line in re.split(r"[\r\n]", plain) if "tiles/s" in line)
    assert re.search(r" left (\d+:\d\d:\d\d|-:--:--)$", line.rstrip())
    assert len(line) <= 80
