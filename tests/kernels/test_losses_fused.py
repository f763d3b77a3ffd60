from collections.abc import Callable

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("where", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("op", ["supcon", "alignment"])
def test_fused_kernels(op: str, where: str, run_fused_cases: Callable[[str, str], None]) -> None:
    run_fused_cases(op, where)
