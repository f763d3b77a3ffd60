"""The training loss, in two presets."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from hmil_fast.errors import UsageError
from hmil_fast.labels import LabelTree
from hmil_fast.losses.alignment import instance_alignment
from hmil_fast.losses.contrastive import contrastive, contrastive_released
from hmil_fast.losses.hierarchy import bag_alignment, bag_alignment_released, level_cross_entropy
from hmil_fast.losses.schedule import alpha_released, beta_paper, tau_released

PRESETS = ("paper", "released")


class ModelOutput(Protocol):
    """What the loss reads of a model's output (`hmil_fast.models.output.HmilOutput`)."""

    @property
    def logits(self) -> tuple[Tensor, ...]:
        """[B, K_l] per level, coarse first."""

    @property
    def attention_logits(self) -> tuple[Tensor, ...]:
        """[N, K_l] per level, or empty."""

    @property
    def lse(self) -> tuple[Tensor, ...]:
        """[B, K_l] per level, or empty."""

    @property
    def embeddings(self) -> Tensor | None:
        """[B, K, E], or None."""


class LossTerms(NamedTuple):
    """The loss and what it is made of.

    Attributes:
        total: Scalar to call ``backward`` on.
        terms: Detached scalars before weighting, still on the device: ``fine``, ``coarse`` (mean
            over the levels above the leaves), ``hba``, ``ham`` (means over adjacent levels),
            ``supcon``. A term that does not apply is absent.
    """

    total: Tensor
    terms: dict[str, Tensor]


class HmilLoss(nn.Module):
    """Loss of HMIL on a label tree of any depth.

    ``paper``: β (L_c + HAM + HBA) + (1 − β) SupCon + L_f with β = 1 − e/E and τ = 0.1. The paper's
    text was not at hand: these equations come from a second-hand summary of it and from the
    authors' figure.

    ``released``: α L_c + L_f + HBA + (1 − α) SupCon, the arithmetic of the authors' code: α =
    1 − (e/E)², HBA with a second softmax, HAM reported but not in the total, SupCon with τ going
    1 → 0.1 → 1, scaled by τ/0.1 and divided by the number of bags once more.

    L_c, HBA and HAM are means over the levels or pairs of levels they apply to; with two levels
    they are the published terms, with one there is only L_f and SupCon. Terms whose inputs the
    model does not return (attention, embeddings) are left out.

    Args:
        tree: The label tree.
        preset: One of `PRESETS`.

    Raises:
        UsageError: No such preset.
    """

    def __init__(self, tree: LabelTree, preset: str = "paper") -> None:
        super().__init__()
        if preset not in PRESETS:
            raise UsageError(f"there is no preset {preset!r}", f"choose {' or '.join(PRESETS)}")
        self.preset, self.num_classes = preset, tree.num_classes
        for l, parent in enumerate(tree.parents):
            p = torch.tensor(parent)
            self.register_buffer(f"parent{l}", p, persistent=False)
            children = p == torch.arange(tree.num_classes[l])[:, None]
            self.register_buffer(f"children{l}", children, persistent=False)

    def forward(
        self, output: ModelOutput, bags: Tensor, targets: Tensor, epoch: int, epochs: int
    ) -> LossTerms:
        """The loss of one step.

        Args:
            output: What the model returned for these bags.
            bags: int64 [B, 2], (start, length) of each bag; keep it on the CPU.
            targets: int64 [B, L], the node of each bag per level, coarse first.
            epoch: e, from 0.
            epochs: E.

        Raises:
            ValueError: Output or targets do not fit the tree, or epochs is no positive number.
        """
        self._check(output, targets, epochs)
        progress = epoch / epochs
        released = self.preset == "released"
        weight = alpha_released(progress) if released else beta_paper(progress)

        *coarse, fine = level_cross_entropy(output.logits, targets)
        terms = {"fine": fine}
        total = fine
        if coarse:
            terms["coarse"] = _mean(coarse)
            hba = bag_alignment_released if released else bag_alignment
            terms["hba"] = _mean(
                [
                    hba(output.logits[l + 1], self.get_buffer(f"children{l}"), targets[:, l])
                    for l in range(len(coarse))
                ]
            )
            total = total + weight * terms["coarse"] + (1 if released else weight) * terms["hba"]
        if coarse and output.attention_logits:
            parents = tuple(self.get_buffer(f"parent{l}") for l in range(len(coarse)))
            with torch.set_grad_enabled(torch.is_grad_enabled() and not released):
                terms["ham"] = _mean(
                    instance_alignment(output.attention_logits, output.lse, parents, bags)
                )
            if not released:
                total = total + weight * terms["ham"]
        if output.embeddings is not None:
            leaf = targets[:, -1]
            terms["supcon"] = (
                contrastive_released(output.embeddings, leaf, tau_released(progress))
                if released
                else contrastive(output.embeddings, leaf, 0.1)
            )
            total = total + (1 - weight) * terms["supcon"]
        return LossTerms(total, {name: term.detach() for name, term in terms.items()})

    def _check(self, output: ModelOutput, targets: Tensor, epochs: int) -> None:
        classes = tuple(level.shape[1] for level in output.logits)
        if classes != self.num_classes:
            raise ValueError(
                f"output.logits has {classes} classes per level, the tree {self.num_classes}; "
                "build the model with num_classes=tree.num_classes"
            )
        if targets.dtype != torch.int64 or list(targets.shape) != [
            output.logits[0].shape[0],
            len(classes),
        ]:
            raise ValueError(
                f"targets is {targets.dtype} {list(targets.shape)}; give int64 "
                f"[{output.logits[0].shape[0]}, {len(classes)}], a node per bag and level"
            )
        if epochs < 1:
            raise ValueError(f"epochs is {epochs}; give a positive number")


def _mean(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).mean()
