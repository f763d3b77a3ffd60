import pytest
import torch
from torch import Tensor

from hmil_fast.kernels.bags import as_bags, bag_rows, check_bags

PAIRS = torch.tensor([[0, 3], [3, 0], [3, 67]])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "bags", [[[0, 3], [3, 0], [3, 67]], [0, 3, 3, 70]], ids=["pairs", "bounds"]
)
def test_bounds_and_int32_say_the_same_as_pairs(bags: list[int], dtype: torch.dtype) -> None:
    said = torch.tensor(bags, dtype=dtype)
    assert torch.equal(as_bags(said), PAIRS)
    assert check_bags(said, 70) == [(0, 3), (3, 0), (3, 67)]


def test_no_bags_are_fine() -> None:
    assert check_bags(torch.zeros(0, 2, dtype=torch.int64), 0) == []
    assert check_bags(torch.tensor([0]), 0) == []


@pytest.mark.parametrize(
    ("bags", "said"),
    [
        (torch.zeros(3, 2), r"bags is torch.float32 \[3, 2\]; give int64 \[B, 2\]"),
        (torch.zeros(3, 3, dtype=torch.int64), r"bags is torch.int64 \[3, 3\]"),
        (torch.tensor(3), r"bags is torch.int64 \[\]; give"),
        (torch.tensor([], dtype=torch.int64), r"bags is torch.int64 \[0\]; give"),
        (torch.tensor([0, 5, 3]), r"bags\[1\] = \(5, -2\)"),
        (torch.tensor([[0, 5], [66, 5]]), r"bags\[1\] = \(66, 5\) leaves the 70 rows"),
    ],
)
def test_bad_bags_are_named(bags: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_bags(bags, 70)


def test_rows_of_bags_one_after_another() -> None:
    rows, bag = bag_rows([(5, 2), (0, 0), (1, 3)], torch.device("cpu"))
    assert rows.tolist() == [5, 6, 1, 2, 3]
    assert bag.tolist() == [0, 0, 2, 2, 2]
