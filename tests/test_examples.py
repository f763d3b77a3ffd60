"""Run the examples of docs/python.md and of the public names, on twelve small slides."""

import doctest
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import hmil_fast
from hmil_fast.io.slide import open_slide

pytestmark = pytest.mark.slow
PAGE = Path(__file__).resolve().parent.parent / "docs" / "python.md"
LEAVES = ("N", "PB", "IC")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, module_slide: Path) -> Iterator[Path]:
    """slides/s00.tif to s11.tif, labels.csv and tree.yaml, as the current folder."""
    import tifffile

    path = tmp_path_factory.mktemp("examples")
    (path / "slides").mkdir()
    rows = ["slide_id,label,patient_id"]
    with open_slide(module_slide) as slide:
        wide, high = slide.info.level_dimensions[0]
        picture = slide.thumbnail(max(wide, high))
    for i in range(12):
        y, x = 400 + 500 * (i % 4), 640 + 90 * (i // 4)  # glass and tissue
        region = picture[y : y + 512, x : x + 512]
        centimetre = (10_000 / 0.5, 10_000 / 0.5)
        tifffile.imwrite(
            path / "slides" / f"s{i:02d}.tif",
            np.ascontiguousarray(region),
            tile=(256, 256),
            photometric="rgb",
            compression="deflate",
            resolution=centimetre,
            resolutionunit="CENTIMETER",
        )
        rows.append(f"s{i:02d},{LEAVES[i % 3]},P{i}")
    (path / "labels.csv").write_text("\n".join(rows) + "\n")
    (path / "tree.yaml").write_text("benign: [N, PB]\nmalignant: [IC]\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        yield path


@pytest.fixture(scope="module")
def module_slide() -> Path:
    return Path(__file__).resolve().parent / "data" / "cmu1_small_pyramid.tif"


@pytest.fixture(scope="module")
def page(folder: Path) -> dict[str, object]:
    """The blocks of the page, run one after the other."""
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)  # noqa: S102
    return names


@pytest.mark.slow
def test_the_page_runs_and_uses_every_public_name(folder: Path, page: dict[str, object]) -> None:
    assert (folder / "s00.png").stat().st_size > 1000
    assert len(page["p_leaf"]) == len(LEAVES)  # type: ignore[arg-type]
    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in hmil_fast.__all__ if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize("name", hmil_fast.__all__)
def test_the_example_of_a_name_is_true(name: str, page: dict[str, object]) -> None:
    value = getattr(hmil_fast, name)
    (test,) = (test for test in doctest.DocTestFinder(recurse=False).find(value, name, globs={}))
    assert test.examples, f"{name} has no example"
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test)
    assert result.failed == 0
