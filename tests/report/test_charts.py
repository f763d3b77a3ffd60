"""Charts hold what they are given, also at the edges, and never warn."""

import re
import warnings
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from hmil_fast.report.html.charts import (
    curves_chart,
    reliability_chart,
    roc_chart,
)


def texts(svg: str) -> list[str]:
    root = ET.fromstring(svg)  # noqa: S314 - our own output
    return ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize(("slides", "classes"), [(0, 2), (1, 2), (3, 9), (120, 3), (300, 40)])
def test_charts_of_few_and_many(slides: int, classes: int) -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, classes, slides)
    p = rng.dirichlet(np.ones(classes), slides)
    names = [f"_a rather long name of diagnosis {c} 乳腺 $\\frac$ <b>" for c in range(classes)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)  # of libraries among each other
        charts = [
            roc_chart(y, p, names),
            reliability_chart(y, p),
        ]
    for svg in charts:
        assert texts(svg)
        assert svg.count("<svg") == 1
    with_both = sum(0 < (y == c).sum() < slides for c in range(classes))
    assert sum("(n=" in text for text in texts(charts[0])) == with_both


def test_curves_take_the_later_of_two_and_pass_over_what_is_not_finite() -> None:
    first = {"event": "epoch", "fold": 0, "epoch": 0, "loss": 900.0, "val_loss": None}
    again = {**first, "loss": 2.0, "terms": {"_hba": 1.0, "ham": float("nan")}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = texts(curves_chart([first, again]))
        curves_chart([])
    assert " train" in drawn
    assert " _hba" in drawn
    assert not any("validation" in text or "ham" in text for text in drawn)
    assert max(float(text) for text in drawn if re.fullmatch(r"[\d.]+", text)) < 10


def test_charts_are_the_same_every_time() -> None:
    y, p = np.array([0, 1, 1]), np.array([[0.7, 0.3], [0.4, 0.6], [0.6, 0.4]])
    assert roc_chart(y, p, ["a", "b"]) == roc_chart(y, p, ["a", "b"])
