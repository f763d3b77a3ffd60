"""Slides with damaged tags and bytes: read, or refused in words, never a crash or a bug's words."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "fuzz_slides.py"


def test_no_mutant_ends_in_a_crash_or_in_words_for_programmers(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path), "0", "210"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    left = sorted(path.name for path in tmp_path.glob("mutant-*"))
    assert (done.returncode, done.stdout, left) == (0, "", []), done.stderr[-2000:]
