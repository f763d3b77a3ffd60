"""What the documents say exists: links, paths of the repository, commands and their options."""

import re
from pathlib import Path

import pytest

from hmil_fast.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "bench").glob("*.md")])
FOLDERS = ("hmil_fast", "kernels", "io", "bench", "tests", "docs")
WITH_ACTIONS = ("store", "splits")


def heading_anchors(page: Path) -> set[str]:
    """The anchors that a Markdown viewer gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in heading_anchors(file)):
            missing.append(target)
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_of_the_repository_exist(page: Path) -> None:
    names = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)`", page.read_text(encoding="utf-8"))
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_map_names_every_package_and_no_other() -> None:
    """The tree in CONTRIBUTING: each folder of code has a line, each line a folder or module."""
    block = re.search(r"```\n(hmil_fast/.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert block is not None
    named, top = set(), ""
    for line in block[1].splitlines():
        match = re.match(r"(  )?([\w.]+(?:/[\w.]+)*/?)  ", line + "  ")
        if match is None:
            continue  # a line goes on
        top = top if match[1] else match[2]
        named.add((top if match[1] else "") + match[2])
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    folders = {
        f"{path.relative_to(ROOT)}/"
        for name in ("hmil_fast", "kernels", "io")
        for path in (ROOT / name).iterdir()
        if path.is_dir() and any(path.glob("*.py"))
    }
    assert {name for name in folders if not name.startswith("kernels/")} <= named


def commands() -> list[tuple[str, str]]:
    """Calls of hmil-fast in the code of all pages: the command with its action, the whole line."""
    calls = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for call in re.findall(r"hmil-fast +([a-z][^`\n|>#]*)", text):
            words = call.split()
            action = len(words) > 1 and words[0] in WITH_ACTIONS
            name = " ".join(words[: 1 + action])
            if re.search(r"--\w", call) and re.fullmatch(r"[a-z]+( [a-z]+)?", name):
                calls.append((name, call))
    return calls


def test_commands_have_the_options_that_the_documents_give_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    known: dict[str, set[str]] = {}
    wrong = []
    assert len(commands()) > 10
    for name, call in commands():
        if name not in known:
            with pytest.raises(SystemExit):
                main([*name.split(), "--help"])
            known[name] = set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
        options = re.findall(r"(?<=\s)--[a-z][\w-]*", call)
        wrong += [f"{name} {option}" for option in options if option not in known[name]]
    assert wrong == []
