"""Rows gathered from real gloo processes, against one process that holds them all."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing

from hmil_fast.kernels.supcon import gather_rows, supcon
from hmil_fast.losses.contrastive import contrastive, contrastive_released

SIZES = [4, 0, 7]  # bags per rank


def _embeddings() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(sum(SIZES), 3, 5, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(z, dim=2), torch.arange(sum(SIZES)) % 4


def _rank(rank: int, sizes: list[int], folder: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meet"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=len(sizes))
    z, labels = _embeddings()
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    total = sum(sizes)
    part = z[own].clone().requires_grad_()
    rows, row_labels = gather_rows(part, labels[own])
    assert torch.equal(rows, z[:total])
    assert torch.equal(row_labels, labels[:total])
    found = {"rows": torch.autograd.grad(supcon(rows.flatten(1), row_labels, 0.5), part)[0]}
    for loss in (contrastive, contrastive_released):
        value = loss(part, labels[own], 0.5)
        found[loss.__name__] = torch.autograd.grad(value, part)[0]
        found[f"{loss.__name__} value"] = value.detach()
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.barrier()
    os._exit(0)  # torch's threads have been seen to abort an ordinary exit


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_equal_one_process_with_all_rows(ranks: int, tmp_path: Path) -> None:
    sizes = SIZES[:1] + SIZES[2:] if ranks == 2 else SIZES
    multiprocessing.spawn(_rank, (sizes, str(tmp_path)), nprocs=ranks)
    z, labels = _embeddings()
    z.requires_grad_()
    losses = {
        "rows": supcon(z.flatten(1), labels, 0.5),
        "contrastive": contrastive(z, labels, 0.5),
        "contrastive_released": contrastive_released(z, labels, 0.5),
    }
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
    for name, loss in losses.items():
        exact = ranks * torch.autograd.grad(loss, z)[0]  # summed over the ranks
        ours = torch.cat([part[name] for part in found])
        torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-13)
        if name != "rows":
            for part in found:
                torch.testing.assert_close(part[f"{name} value"], loss.detach())


def test_without_a_process_group_nothing_changes() -> None:
    z, labels = _embeddings()
    assert gather_rows(z, labels)[0] is z
    with pytest.raises(ValueError, match="labels has 10 rows, z 11; give one label per row"):
        gather_rows(z, labels[:10])
