"""The command `settings`: every setting of training, its values, defaults and meaning."""

import argparse
import json

from hmil_fast.cli.options import Commands, add_command
from hmil_fast.config import Recipe, Runtime, TrainConfig
from hmil_fast.settings import PRESET_NAMES, Setting, settings_of

GROUPS = {
    "Recipe: model, loss and optimiser": Recipe,
    "TrainConfig: data and folds": TrainConfig,
    "Runtime: not part of a run's identity": Runtime,
}


def add_settings(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add `settings`."""

    def run(args: argparse.Namespace) -> int:
        print(as_json() if args.json else as_text())
        return 0

    text = "List every setting of train, with its values, defaults and meaning."
    parser = add_command(commands, "settings", text, run)
    parser.add_argument("--json", action="store_true", help="print the settings as JSON")


def as_json() -> str:
    """Return all settings as JSON: by class a list of name, values, defaults and text."""
    classes = {
        kind.__name__: [
            {
                "name": each.name,
                "values": each.allowed.text,
                "default": dict(zip(PRESET_NAMES, each.defaults, strict=True)),
                "text": each.text,
            }
            for each in settings_of(kind)
        ]
        for kind in GROUPS.values()
    }
    return json.dumps(classes, indent=1, ensure_ascii=False)


def as_text() -> str:
    """Return all settings for a terminal of 80 columns."""
    from textwrap import fill, indent

    lines = []
    for title, kind in GROUPS.items():
        lines += [title, "-" * len(title)]
        for each in settings_of(kind):
            lines.append(f"{each.name} = {_default(each)}")
            lines.append(indent(fill(f"[{each.allowed.text}] {each.text}", 76), "    "))
        lines.append("")
    return "\n".join([*lines, "Set them by key=value: hmil-fast train … preset=paper lr=3e-4"])


def as_markdown() -> str:
    """Return docs/settings.md."""
    lines = [
        "# Settings of training",
        "",
        "Every setting is a `key=value` of `hmil-fast train`, or a line of its `--config` file.",
        "`preset=paper` gives all of them the values of that column; what is named beside it wins.",
        "`hmil-fast settings` prints this list.",
    ]
    for title, kind in GROUPS.items():
        presets = PRESET_NAMES if kind is Recipe else ("default",)
        lines += ["", f"## {title}", ""]
        lines.append(f"| setting | {' | '.join(presets)} | values | what it sets |")
        lines.append("|---" * (3 + len(presets)) + "|")
        for each in settings_of(kind):
            defaults = [f"{value:g}" if isinstance(value, float) else value
                        for value in each.defaults[: len(presets)]]  # fmt: skip
            cells = [f"`{each.name}`", *map(str, defaults), each.allowed.text, each.text]
            lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _default(setting: Setting) -> str:
    best, *others = (f"{v:g}" if isinstance(v, float) else str(v) for v in setting.defaults)
    if set(others) == {best}:
        return best
    if others[0] == others[1]:
        return f"{best}  (paper, released: {others[0]})"
    return f"{best}  (paper: {others[0]}, released: {others[1]})"
