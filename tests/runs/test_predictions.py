"""predictions.csv: written and read again, and refused by line where it is damaged."""

import csv
from pathlib import Path

import numpy as np
import pytest

from hmil_fast.errors import UsageError
from hmil_fast.labels import LabelTree
from hmil_fast.metrics import all_levels, decide
from hmil_fast.runs.predictions import (
    Prediction,
    read_predictions,
    stack_heads,
    write_predictions,
)

TREE = LabelTree.from_nested({"n": None, "t": {"b": None, "m": ["low", "high"]}})


def predictions(heads: bool) -> list[Prediction]:
    rng = np.random.default_rng(0)

    def levels() -> tuple[np.ndarray, ...]:
        return tuple(level[0] for level in all_levels(TREE, rng.dirichlet(np.ones(4))[None]))

    return [
        Prediction(f"s{i}", f"p{i}", 0, TREE.leaves[i], 7, levels(), levels()[:2] if heads else ())
        for i in range(4)
    ]


@pytest.mark.parametrize("heads", [True, False])
def test_predictions_and_heads_come_back_as_written(tmp_path: Path, heads: bool) -> None:
    path = tmp_path / "predictions.csv"
    wanted = predictions(heads)
    write_predictions(path, TREE, wanted, heads=heads)
    for found, want in zip(read_predictions(path, TREE), wanted, strict=True):
        assert found.slide_id == want.slide_id
        assert len(found.heads) == (2 if heads else 0)
        for a, b in zip(
            (*found.probabilities, *found.heads), (*want.probabilities, *want.heads), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-8)
    with path.open(newline="") as file:
        row = next(csv.DictReader(file))
    assert ("h1_m" in row) is heads
    assert float(row["p1_m"]) == pytest.approx(wanted[0].probabilities[1][2])
    if heads:
        assert float(row["h1_m"]) == pytest.approx(wanted[0].heads[1][2])
        stacked = stack_heads(wanted)
        assert [level.shape for level in stacked] == [(4, 2), (4, 3)]
        np.testing.assert_array_equal(stacked[1][1], wanted[1].heads[1])
    for name, level in (("prediction", 2), ("prediction_1", 1), ("prediction_0", 0)):
        answer = decide(TREE, wanted[0].probabilities[-1][None]).nodes[level, 0]
        assert row[name] == TREE.names[level][answer]
    assert "p0_n" not in row  # a chain of only children is one node


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\ns1,p1,0,b,", "\ns1,p1,0,sarcoma,", "line 3: label 'sarcoma' is not a leaf"),
        ("\ns2,p2,0,", "\ns2,p2,first,", "line 4: invalid literal"),
        ("p2_low", "p2_other", "has no column p2_low"),
        (",num_tiles,", ",tiles,", "has no column num_tiles"),
    ],
)
def test_a_damaged_file_is_refused_by_line_or_column(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    path = tmp_path / "predictions.csv"
    write_predictions(path, TREE, predictions(True))
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    with pytest.raises(UsageError, match=message) as refused:
        read_predictions(path, TREE)
    assert "hmil-fast train" in refused.value.fix
