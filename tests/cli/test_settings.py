"""`hmil-fast settings` and docs/settings.md say the same as the classes of settings."""

import json
from pathlib import Path

import pytest

from hmil_fast.cli.main import main
from hmil_fast.cli.settings import as_markdown
from hmil_fast.config import TrainConfig
from hmil_fast.recipe import PRESETS

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "settings.md"


def test_the_page_is_what_the_classes_say() -> None:
    """To write it anew: python tests/cli/test_settings.py."""
    assert PAGE.read_text(encoding="utf-8") == as_markdown()


def test_every_setting_is_printed_within_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for name in (*TrainConfig().values(), "device", "cache", "precision", "threads"):
        assert f"\n{name} = " in text
    assert "lr = 0.006  (paper, released: 0.0001)" in text


def test_json_has_the_defaults_of_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "--json"]) == 0
    recipe = json.loads(capsys.readouterr().out)["Recipe"]
    for preset, values in PRESETS.items():
        assert {each["name"]: each["default"][preset] for each in recipe} == vars(values)


if __name__ == "__main__":
    PAGE.write_text(as_markdown(), encoding="utf-8")
