"""Slides that two files name differently: matched where there is one reading."""

import pytest

from hmil_fast.bags.match_names import match_slides
from hmil_fast.errors import UsageError

UUID = "4a2f9d1c-0b1e-4c6f-9a57-0123456789ab"


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("s1", "s1"),
        ("s1.svs", "s1"),
        ("s1.SVS", "s1"),
        ("s1", "s1.svs"),
        ("s1.ome.tiff", "s1.ome"),
        ("s1.svs.h5", "s1"),
        ("Pra\u0308parat", "Pr\u00e4parat"),
        ("1014.0", "1014"),
        ("1014", "1014.0"),
        ("7", "007"),
        ("S1.svs", "s1"),
        ("s1 ", "s1"),
        ("s\u00a01", "s 1"),
        ("/data/slides/s1.svs", "s1"),
        ("C:\\slides\\a\\s1.svs", "a/s1"),
        ("s1", "a/b/s1"),
        ("TCGA-AA-0001-01Z-00-DX1", f"TCGA-AA-0001-01Z-00-DX1.{UUID}"),
        (f"TCGA-AA-0001-01Z-00-DX1.{UUID.upper()}.svs", f"TCGA-AA-0001-01Z-00-DX1.{UUID}"),
    ],
)
def test_one_reading(name: str, known: str) -> None:
    others = ["s2", "s10", "b/s2", "1015", "s"]
    assert match_slides([name, "s2"], [known, *others]) == {name: known, "s2": "s2"}


@pytest.mark.parametrize(
    ("name", "known"),
    [("s1", "s10"), ("s1", "s1.1"), ("s1.1", "s1.2"), ("a/s1", "b/s1"), ("s1.5", "s1"), ("s", "1")],
)
def test_no_reading(name: str, known: str) -> None:
    assert match_slides([name], [known]) == {}


@pytest.mark.parametrize(
    ("names", "known", "message"),
    [
        (["s1"], ["a/s1", "b/s1"], "slide 's1' may be 'a/s1' or 'b/s1'"),
        (["S1"], ["s1", "s1.tif", "x"], "slide 'S1' may be 's1' or 's1.tif'"),
        (["s1", "s1.svs"], ["s1"], "'s1' and 's1.svs' both name the slide 's1'"),
        (["1014", "1014.0"], ["1014"], "both name the slide '1014'"),
        (["x/s1", "y/s1"], ["s1"], "both name the slide 's1'"),
    ],
)
def test_two_readings_are_refused(names: list[str], known: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        match_slides(names, known)


def test_a_slide_named_in_full_is_not_another_one_too() -> None:
    assert match_slides(["s1", "S1"], ["s1"]) == {"s1": "s1"}
    assert match_slides(["S1", "s1"], ["s1", "S1"]) == {"s1": "s1", "S1": "S1"}
