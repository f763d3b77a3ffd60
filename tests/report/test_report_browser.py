"""The report in a browser: from a file, without network, by mouse and by key."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hmil_fast.cli.main import main
from hmil_fast.labels import LabelTree
from hmil_fast.report.html.page import write_report

pytestmark = pytest.mark.slow

Browser = Any  # of conftest.py


@pytest.fixture(scope="module")
def reported(run: Any, cohort: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run with its report and that of its baseline."""
    path = tmp_path_factory.mktemp("reported") / "run"
    shutil.copytree(run.path, path)
    for each in (path, path / "baseline"):
        store = ["--store", str(cohort.path / "store"), "--heatmaps", "6"]
        assert main(["report", str(each), *store]) == 0
    return path


@pytest.fixture
def page(browser: Browser, reported: Path) -> Iterator[Browser]:
    """The browser at the report; nothing may be logged, and nothing but the file fetched."""
    browser.logged.clear()
    browser.fetched.clear()
    browser.open(reported / "report.html")
    yield browser
    assert browser.logged == []
    assert {u.partition(":")[0] for u in browser.fetched} <= {"file", "data", "about"}
    assert {u for u in browser.fetched if u.startswith("file")} <= {
        u for u in browser.fetched if u.endswith("report.html")
    }


SHOWN = "[...document.querySelectorAll('#slide-table tbody tr')].filter(r => !r.hidden)"
INK = "stage.toDataURL()"
SCALE = (
    "document.getElementById('scale').textContent + document.querySelector('#scale i').style.width"
)


def look(page: Browser, number: int = 0) -> None:
    """Open a slide by key, and wait for its picture."""
    page.do(f"document.querySelectorAll('button.look')[{number}].focus()")
    page.key("Enter")
    page.wait("document.getElementById('viewer').open && open.tint")


def test_the_table_sorts_by_key_and_is_filtered(page: Browser) -> None:
    heads = page.do("[...document.querySelectorAll('#slide-table th')].map(h => h.textContent)")
    column = heads.index("tiles")
    cells = f"{SHOWN}.map(r => Number(r.cells[{column}].textContent))"
    before = page.do(cells)
    assert len(before) == 36
    assert before != sorted(before)
    page.do(f"document.querySelectorAll('#slide-table th')[{column}].firstChild.focus()")
    page.key("Enter")
    assert page.do(cells) == sorted(before)
    page.key("Enter")
    assert page.do(cells) == sorted(before, reverse=True)
    assert page.do("document.querySelector('th[aria-sort]').getAttribute('aria-sort')") == (
        "descending"
    )
    page.do("document.getElementById('find').focus()")
    for letter in "s07":
        page.key(letter)
    assert page.do(f"{SHOWN}.map(r => r.cells[1].textContent)") == ["s07"]
    assert page.do("document.getElementById('shown').textContent") == "1 of 36 shown"
    page.do("document.getElementById('clear').click()")
    assert page.do(f"{SHOWN}.length") == 36


def test_a_cell_of_the_confusion_matrix_lists_its_slides(page: Browser) -> None:
    cells = page.do("""[...document.querySelectorAll('button[data-level="1"]')].map(b => {
        b.click(); return [Number(b.textContent), b.dataset.true, b.dataset.predicted,
        [...document.querySelectorAll('#slide-table tbody tr')].filter(r => !r.hidden)
        .map(r => [r.cells[4].textContent, r.cells[5].textContent])]; })""")
    names = page.do("tree.names.at(-1)")
    assert sum(count for count, *_ in cells) == 36
    for number, true, said, rows in cells:
        assert rows == [[names[int(true)], names[int(said)]]] * number


def test_a_slide_opens_and_closes_by_key(page: Browser) -> None:
    look(page, 1)
    name = page.do("document.getElementById('viewer-name').textContent")
    assert page.do("document.activeElement.id") == "stage"
    page.key("PageDown")
    page.wait(f"document.getElementById('viewer-name').textContent !== '{name}' && open.tint")
    other = page.do("document.getElementById('viewer-name').textContent")
    looks = page.do("[...document.querySelectorAll('tr:has(.look)')].map(r => r.dataset.slide)")
    assert [name, other] == looks[1:3]
    page.key("Escape")
    page.wait("!document.getElementById('viewer').open")
    page.wait(f"document.activeElement.closest('tr')?.dataset.slide === '{other}'")


def test_nodes_are_switched_and_their_own_attention_painted(page: Browser) -> None:
    look(page)
    names = page.do("tree.names.flat()")
    said = page.do("[...document.querySelectorAll('#nodes label')].map(l => l.textContent)")
    assert len(said) == len(names) == 6  # no chains in this tree
    checked = "[...document.querySelectorAll('#nodes input')].findIndex(i => i.checked)"
    answer = page.do(checked)
    assert "predicted" in page.do(
        f"document.querySelectorAll('#nodes label')[{answer}].children[1].className"
    )
    tops = "[...document.querySelectorAll('#tops button')].map(b => b.ariaLabel).join()"
    seen = {(page.do(INK), page.do(tops))}
    page.do("document.querySelector('#nodes input:checked').focus()")
    for _ in range(5):
        page.key("ArrowDown")
        seen.add((page.do(INK), page.do(tops)))
    assert len({ink for ink, _ in seen}) == len({t for _, t in seen}) == 6
    # without the tissue below, a place among the colours has its colour, on either scale
    page.do("$('opacity').value = 100, opacityChanged()")
    for scale in ("share", "rank"):
        page.do(f"$('by').value = '{scale}', $('by').dispatchEvent(new Event('change'))")
        key = page.do("[...$('key').children].map(part => part.innerText)")
        assert key[0] == page.do(f"tree.keys.{scale}")
        assert key[2].split() == (
            ["0", "0.5", "1"] if scale == "rank" else ["≤", "1/8", "1", "≥", "8"]
        )
        places = page.do(f"[...bytes(open.map.places.{scale})]")
        for place in (max(places), min(places)):
            got, colour = page.do(f"""(() => {{
                const {{layer}} = open, cell = layer.cells[{places.index(place)}];
                const [a, c] = [0, 2].map(i => layer.x + cell[i] * layer.px);
                const [b, d] = [1, 3].map(i => layer.y + cell[i] * layer.px);
                const dot = Object.assign(make("canvas"), {{width: 1, height: 1}}).getContext("2d");
                const x = ((a + c) / 2 - at.x) * at.zoom, y = ((b + d) / 2 - at.y) * at.zoom;
                dot.drawImage(stage, x, y, 1, 1, 0, 0, 1, 1);
                const first = 3 * Math.round({place} * 255 / 254);
                const px = dot.getImageData(0, 0, 1, 1);
                return [[...px.data], [...colours.slice(first, first + 3)]];
            }})()""")
            assert got == pytest.approx([*colour, 255], abs=3)
            value = place / 254 if scale == "rank" else 8 ** (2 * place / 254 - 1)
            shown = page.do(f"open.value(...open.layer.cells[{places.index(place)}].slice(0, 2))")
            assert shown == pytest.approx(value)


def test_names_run_nothing(
    browser: Browser, made_up_run: Callable[..., Path], tmp_path: Path
) -> None:
    evil = "</script><img src=x onerror=document.title='owned'><script>document.title='owned'"
    names = [evil, "\"' autofocus onfocus=document.title='owned' x='", "{{ title }}", "\u202eN&lt;"]
    tree = LabelTree.from_nested({f"{evil} 1": names[:2], f"{evil} 2": names[2:]})
    run = made_up_run(tmp_path / "run", tree, evil)
    browser.logged.clear()
    browser.open(write_report(run))
    look(browser)
    browser.do("document.querySelectorAll('button[data-level]').forEach(b => b.click())")
    assert browser.do("document.getElementById('viewer-name').textContent") == evil
    assert browser.do("document.title") == "hmil-fast: run"
    assert browser.do("[...document.querySelectorAll('#nodes label')].length") == 1
    # the button that `look` focuses may come before the stage's autofocus, which says so
    assert [line for line in browser.logged if "Autofocus" not in line] == []


def test_a_chain_of_only_children_is_one_row_and_says_how_even_its_attention_is(
    browser: Browser, cohort: Any, hmil: Any, tmp_path: Path, settings: Any
) -> None:
    (tmp_path / "tree.yaml").write_text("N: [N]\nPB:\nmalignant: {bad: [DCIS, IC]}\n")
    labels, store = cohort.path / "labels.csv", cohort.path / "store"
    run = tmp_path / "run"
    quick = [*settings, "epochs=2", "folds=2", "baseline=none"]
    files = ("--store", store, "--labels", labels, "--tree", tmp_path / "tree.yaml")
    made = hmil("train", *files, "--out", run, *quick)
    assert made.returncode == 0, made.stderr
    assert main(["report", str(run), "--store", str(store), "--heatmaps", "1"]) == 0
    browser.open(run / "report.html")
    look(browser)
    labels = "[...document.querySelectorAll('#nodes label')]"
    rows = browser.do(f"{labels}.map(l => l.innerText)")
    assert [row.split("\n")[0] for row in rows] == ["N", "PB", "malignant > bad", "DCIS", "IC"]
    assert browser.do(f"{labels}.map(l => l.style.getPropertyValue('--deep')).join('')") == "00011"
    assert browser.do("open.map.level") == 2
    assert browser.do("$('spread').textContent").startswith("top 10 % of tiles: ")


def test_the_slide_is_zoomed_moved_and_bared(page: Browser) -> None:
    look(page)
    whole, scale = page.do(INK), page.do(SCALE)
    assert "µm" in scale
    page.key("+")
    assert page.do(SCALE) != scale
    page.key("ArrowRight")
    moved = page.do("[at.x, at.y, at.zoom]")
    page.mouse("mousePressed", 400, 400, button="left", clickCount=1)
    page.mouse("mouseMoved", 430, 380, button="left")
    page.mouse("mouseReleased", 430, 380, button="left", clickCount=1)
    x, y, zoom = page.do("[at.x, at.y, at.zoom]")
    assert (x, y) == pytest.approx((moved[0] - 30 / zoom, moved[1] + 20 / zoom))
    # the wheel zooms at the pointer: what lies under it stays
    under = "[at.x + (400 - stage.getBoundingClientRect().left) / at.zoom, at.zoom]"
    before = page.do(under)
    page.mouse("mouseWheel", 400, 400, deltaX=0, deltaY=-120)
    page.wait(f"{under}[1] > {before[1]}")
    assert page.do(under)[0] == pytest.approx(before[0])
    page.key("0")
    assert (page.do(INK), page.do(SCALE)) == (whole, scale)
    page.key("o")
    assert page.do("document.getElementById('opacity').value") == "0"
    assert page.do(INK) != whole
    page.key("o")
    assert page.do(INK) == whole
    page.do("document.querySelector('#tops button').click()")
    x, y = page.do("[0, 1].map(i => open.map.top[0][1 + i] * open.scale)")
    side, (left, top, zoom) = (
        page.do("open.view.side * open.scale"),
        page.do("[at.x, at.y, at.zoom]"),
    )
    wide, high = page.do("[stage.clientWidth, stage.clientHeight]")
    middle = (x + side / 2 - left) * zoom, (y + side / 2 - top) * zoom
    assert middle == pytest.approx((wide / 2, high / 2))


def test_pages_are_dark_where_the_reader_asks_and_fit_a_narrow_window(
    page: Browser, reported: Path
) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    light = page.do(background)
    page.call("Emulation.setEmulatedMedia", features=dark)
    assert page.do(background) != light
    page.call("Emulation.setEmulatedMedia", features=[])
    page.open(reported / "report.html", "#slide-0", size=(390, 800))
    page.wait("document.getElementById('viewer').open && open.tint")
    assert page.do("document.documentElement.scrollWidth") <= 390
    assert page.do("stage.clientHeight") > 250


def test_a_model_without_attention_and_one_of_a_single_map_are_shown(
    page: Browser, reported: Path
) -> None:
    page.open(reported / "baseline" / "report.html")
    page.do("document.querySelector('button.look').click()")
    page.wait("document.getElementById('viewer').open && open.image")
    assert page.do("document.querySelectorAll('#nodes input').length") == 0
    assert "no attention" in page.do("document.getElementById('tops-note').textContent")

    file = sorted((reported / "views").iterdir())[0]
    text = file.read_text()
    view = json.loads(text)
    one = view["maps"][0] | {"level": 1, "node": None}
    wide = 1.4 * view["cell_side"]  # tiles that overlap
    file.write_text(json.dumps(view | {"maps": [one], "cell_side": wide}))
    assert main(["report", str(reported)]) == 0
    file.write_text(text)
    page.open(reported / "report.html")
    page.do(f"document.querySelector('tr[data-slide=\"{view['slide_id']}\"] button').click()")
    page.wait("document.getElementById('viewer').open && open.tint")
    assert page.do("document.querySelectorAll('#nodes input').length") == 1
    assert page.do("document.querySelectorAll('#tops button').length") == 6
    assert page.do("[open.layer.w, open.layer.px]") == [page.do("open.image.naturalWidth"), 1]
    shown = page.do("placed(open.value(...open.layer.cells[0].slice(0, 2))) * 254")
    assert shown == pytest.approx(page.do("bytes(open.map.places.share)[0]"))


@pytest.mark.parametrize("width", [390, 761, 800, 961])
def test_the_scale_bar_is_as_long_as_it_says_and_not_hidden(
    page: Browser, reported: Path, width: int
) -> None:
    page.open(reported / "report.html", "#slide-0", size=(width, 800))
    page.wait("document.getElementById('viewer').open && open.tint")
    said, bar = page.do(SCALE).removesuffix("px").split("m", 1)
    um = float(said[:-1]) * (1 if said[-1] == "µ" else 1000)
    px, tile = page.do("[open.view.side * open.scale * at.zoom, open.view.side * open.view.mpp]")
    assert float(bar) / um == pytest.approx(px / tile, rel=1e-3)
    longest = "`${Math.min(160, stage.clientWidth / 3)}px`"
    page.do(f"document.querySelector('#scale i').style.width = {longest}")
    assert page.do(
        "$('scale').getBoundingClientRect().right < $('key').getBoundingClientRect().left"
    )
