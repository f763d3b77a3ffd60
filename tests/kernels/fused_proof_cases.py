"""The check of the fused kernels, with kernels that are right and kernels that are wrong.

test_verdict.py runs this file in a process of its own; by hand:
`TRITON_INTERPRET=1 pytest tests/kernels/fused_proof_cases.py`.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hmil_fast.kernels.dispatch import interpreted
from hmil_fast.kernels.proof import Measure, measure, operations

DEVICE = torch.device("cpu" if interpreted() else "cuda:0")
EMPTY = "exp(lse) of an empty bag"
FIRST_ROW = 3 + 130 + 3 + 3 + 1 + 3 + 64 + 3  # of the last bag
KINDS = {
    "gated_attention_pool": {"fp32", "fp16", "bf16"},
    "hierarchy_alignment": {"fp32"},
    "supcon": {"fp32"},
}
RESULTS = {
    "gated_attention_pool": [["pooled", "lse", "logits"], ["x", "W", "b", "Wc", "bc"]],
    "hierarchy_alignment": [["loss"], ["coarse logits", "coarse lse", "fine logits", "fine lse"]],
    "supcon": [["lse"], ["z"]],
}
Results = tuple[Tensor, ...]


def _failed(name: str, part: int, harm: Callable[[Results], Results]) -> dict[str, list[Measure]]:
    """What does not pass if the results of a forward (0) or backward pass (1) are harmed.

    Measures by the kind of products.
    """
    whole = operations()[name]

    def wrong(*operands: Any) -> Any:
        results = whole[part](*operands)
        return harm((results,))[0] if isinstance(results, Tensor) else harm(results)

    fused = (wrong, whole[1]) if part == 0 else (whole[0], wrong)
    found, raised = measure(DEVICE, {name: fused})
    assert not raised
    assert {m.case.split()[0] for m in found} == {name}
    failed: dict[str, list[Measure]] = {}
    for m in found:
        if not m.passed:
            failed.setdefault(m.case.split()[-1], []).append(m)
    assert failed.keys() == KINDS[name]
    return failed


def test_right_kernels_pass() -> None:
    found, raised = measure(DEVICE)
    assert not raised
    wanted = {(name, kind) for name, kinds in KINDS.items() for kind in kinds}
    assert {(m.case.split()[0], m.case.split()[-1]) for m in found} == wanted
    assert all(m.passed for m in found)
    # rounding shows, so what is compared is not one with itself
    assert all(m.error > 0 for m in found if m.output != EMPTY)
    for name, (forward, backward) in RESULTS.items():
        outputs = {m.output for m in found if m.case.startswith(name)} - {EMPTY}
        assert outputs == {*forward, *(f"gradient of {operand}" for operand in backward)}


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("name", list(KINDS))
def test_scaled_outputs_are_found_with_their_numbers(name: str, part: int) -> None:
    failed = _failed(name, part, lambda results: tuple(1.05 * t for t in results))
    wanted = [f"gradient of {k}" if part else k for k in RESULTS[name][part]]
    for measures in failed.values():
        errors = {m.output: m.error for m in measures}
        # the interpreter cuts off where a GPU rounds to bf16: that alone takes up to 0.009 away
        assert all(errors[output] == pytest.approx(0.05, rel=0.2) for output in wanted)


def test_a_wrong_bag_and_a_row_written_beside_the_bags_are_found() -> None:
    def harm(results: Results) -> Results:
        pooled, lse, logits = results
        logits[FIRST_ROW - 1] = 1.0
        return pooled[[0, 1, 0, 3, 4]], lse.nan_to_num(neginf=0.0), logits

    for measures in _failed("gated_attention_pool", 0, harm).values():
        assert {m.output for m in measures} >= {"pooled", "logits", EMPTY}


def test_a_row_left_out_is_found() -> None:
    def harm(results: Results) -> Results:
        results[0][FIRST_ROW] = 0
        return results

    for measures in _failed("gated_attention_pool", 1, harm).values():
        assert [m.output for m in measures] == ["gradient of x"]


def test_nan_is_found() -> None:
    def harm(results: Results) -> Results:
        results[0][FIRST_ROW] = torch.nan
        return results

    for measures in _failed("hierarchy_alignment", 1, harm).values():
        assert [m.output for m in measures] == ["gradient of coarse logits"]
        assert math.isnan(measures[0].error)


def test_a_kernel_that_raises_ends_the_check_by_name() -> None:
    def no_compiler(*_: Any) -> Any:
        raise RuntimeError("Failed to find\nC compiler.")

    fused = {"hierarchy_alignment": operations()["hierarchy_alignment"]}
    found, raised = measure(DEVICE, fused | {"supcon": (no_compiler, no_compiler)})
    assert raised == "supcon fp32: RuntimeError: Failed to find C compiler."
    assert {m.case for m in found} == {"hierarchy_alignment fp32"}
