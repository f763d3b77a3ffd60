"""The training loss: the terms that the settings ask for, weighted and summed."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hmil_fast.errors import UsageError
from hmil_fast.labels import LabelTree
from hmil_fast.losses import hierarchy
from hmil_fast.losses.alignment import instance_alignment
from hmil_fast.losses.contrastive import (
    Levels,
    contrast_levels,
    contrastive,
    contrastive_released,
)
from hmil_fast.losses.contrastive_memory import Nodes
from hmil_fast.losses.curriculum import curriculum, tau_released
from hmil_fast.losses.memory import Memory
from hmil_fast.recipe import PRESETS, Recipe


class ModelOutput(Protocol):
    """What the loss reads of a model's output (`hmil_fast.models.output.HmilOutput`).

    An attribute `auxiliary`, a scalar that the model itself wants minimised, or None, may be
    absent.
    """

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
        terms: Detached scalars before weighting, still on the device: ``fine`` (the leaves; or
            ``marginal``, ``hxe``, ``soft``), ``coarse`` (heads, mean over the levels above the
            leaves), ``hba``, ``ham`` (means over adjacent levels), ``supcon``, ``auxiliary``. A
            term that does not apply is absent.
    """

    total: Tensor
    terms: dict[str, Tensor]


class HmilLoss(nn.Module):
    """Loss of HMIL on a label tree of any depth; `Recipe` states it.

    ``paper``: β (L_c + HAM + HBA) + (1 − β) SupCon + L_f with β = 1 − e/E and τ = 0.1. The paper's
    text was not at hand: these equations come from a second-hand summary of it and from the
    authors' figure.

    ``released``: α L_c + L_f + HBA + (1 − α) SupCon, the arithmetic of the authors' code: α =
    1 − (e/E)², HBA with a second softmax, HAM reported but not in the total, SupCon with τ going
    1 → 0.1 → 1, scaled by τ/0.1 and divided by the number of bags once more.

    L_c, HBA and HAM are means over the levels or pairs of levels they apply to; with two levels
    they are the published terms, with one there is only L_f and SupCon. Terms whose inputs the
    model does not return (attention, embeddings) are left out. Nothing in a step makes the host
    wait for the device.

    Save and load its state dict with the model's: with ``supcon_memory`` it holds the memory.

    Args:
        tree: The label tree.
        recipe: The recipe, or the name of a preset.
        leaf_counts: Training slides per leaf, for ``class_weights="balanced"``.

    Raises:
        UsageError: No such preset.
        ValueError: Balanced class weights without as many counts as leaves.
    """

    def __init__(
        self,
        tree: LabelTree,
        recipe: Recipe | str = "paper",
        leaf_counts: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(recipe, str):
            if recipe not in PRESETS:
                raise UsageError(
                    f"there is no preset {recipe!r}", f"choose one of {', '.join(PRESETS)}"
                )
            recipe = PRESETS[recipe]
        recipe = recipe.loss_terms()
        self.settings, self.num_classes = recipe, tree.num_classes
        self._constant("ancestors", torch.from_numpy(tree.ancestors()))
        for l, parent in enumerate(tree.parents):
            self._constant(f"parent{l}", torch.tensor(parent))
        if recipe.hierarchy == "hxe":
            self._constant("hxe_weights", hierarchy.hxe_weights(tree, recipe.hxe_alpha))
        if recipe.hierarchy == "soft":
            self._constant("soft_labels", hierarchy.soft_labels(tree, recipe.soft_beta))
        if recipe.class_weights == "balanced":
            self._constant("class_weights", _balanced(leaf_counts, len(tree.leaves)))
        if recipe.supcon in ("leaf", "levels"):
            first = 0 if recipe.supcon == "levels" else -1
            levels = contrast_levels(torch.from_numpy(tree.ancestors())[first:])
            self._constant("contrasted", levels.ancestors)
            self._constant("member", levels.nodes.member.float())
            self._constant("node_level", levels.nodes.level.float())
            self._constant("level_weights", levels.weights)
        remembers = recipe.supcon in ("leaf", "levels") and recipe.supcon_memory
        self.memory = Memory(len(tree.leaves), recipe.supcon_memory) if remembers else None

    def forward(
        self,
        output: ModelOutput,
        bags: Tensor,
        targets: Tensor,
        epoch: int,
        epochs: int,
        *,
        gather: bool = True,
    ) -> LossTerms:
        """The loss of one step.

        Args:
            output: What the model returned for these bags.
            bags: int64 [B, 2], (start, length) of each bag; keep it on the CPU.
            targets: int64 [B, L], the node of each bag per level, coarse first.
            epoch: e, from 0.
            epochs: E.
            gather: Whether other ranks, if there are any, have other bags, which SupCon then
                counts too; not so where all share one (`HMIL.forward_chunks`).

        Raises:
            ValueError: Output or targets do not fit the tree, or epochs is no positive number.
        """
        self._check(output, targets, epochs)
        settings = self.settings
        falling, rising = curriculum(settings.curriculum, epoch / epochs)
        name = "fine" if settings.hierarchy == "ce" else settings.hierarchy
        terms = {name: self._hierarchy(output.logits[-1], targets)}
        weights = {name: 1.0}
        if len(self.num_classes) > 1:
            terms["coarse"] = self._heads(output, targets)
            weights["coarse"] = falling * settings.coarse_weight
            if settings.hba != "none":
                terms["hba"] = self._bag_alignment(output, targets)
                outside = settings.hba == "released"
                weights["hba"] = (1 if outside else falling) * settings.hba_weight
            if settings.ham != "none" and output.attention_logits:
                with torch.set_grad_enabled(torch.is_grad_enabled() and settings.ham_weight > 0):
                    terms["ham"] = self._instance_alignment(output, bags)
                weights["ham"] = falling * settings.ham_weight
        if settings.supcon != "none" and output.embeddings is not None:
            leaf = targets[:, -1]
            terms["supcon"] = self._supcon(output.embeddings, leaf, epoch / epochs, gather)
            weights["supcon"] = rising * settings.supcon_weight
        auxiliary = getattr(output, "auxiliary", None)
        if auxiliary is not None:
            terms["auxiliary"], weights["auxiliary"] = auxiliary, 1.0
        total = torch.stack([weight * terms[name] for name, weight in weights.items()]).sum()
        return LossTerms(total, {name: term.detach() for name, term in terms.items()})

    def _hierarchy(self, logits: Tensor, targets: Tensor) -> Tensor:
        settings, leaf = self.settings, targets[:, -1]
        log_p = F.log_softmax(logits, dim=1)
        if settings.hierarchy == "ce":
            bag = F.nll_loss(log_p, leaf, reduction="none")
        elif settings.hierarchy == "marginal":
            bag = hierarchy.marginal(log_p, self.get_buffer("ancestors"), targets)
        elif settings.hierarchy == "hxe":
            ancestors, weights = self.get_buffer("ancestors"), self.get_buffer("hxe_weights")
            bag = hierarchy.hxe(log_p, ancestors, targets, weights)
        else:
            bag = hierarchy.soft_cross_entropy(log_p, leaf, self.get_buffer("soft_labels"))
        if settings.label_smoothing:
            bag = torch.lerp(bag, -log_p.mean(1), settings.label_smoothing)
        if settings.class_weights == "balanced":
            bag = bag * self.get_buffer("class_weights").to(bag.dtype)[leaf]
        return bag.mean()

    def _heads(self, output: ModelOutput, targets: Tensor) -> Tensor:
        smoothing = self.settings.label_smoothing
        return _mean(
            [
                F.cross_entropy(level, targets[:, l], label_smoothing=smoothing)
                for l, level in enumerate(output.logits[:-1])
            ]
        )

    def _bag_alignment(self, output: ModelOutput, targets: Tensor) -> Tensor:
        pairs = [
            (logits, self.get_buffer(f"parent{l}"), targets[:, l])
            for l, logits in enumerate(output.logits[1:])
        ]
        if self.settings.hba == "nll":
            return _mean([hierarchy.bag_alignment(*pair) for pair in pairs])
        released = hierarchy.bag_alignment_released
        return _mean([released(*pair, self.num_classes[l]) for l, pair in enumerate(pairs)])

    def _instance_alignment(self, output: ModelOutput, bags: Tensor) -> Tensor:
        parents = tuple(self.get_buffer(f"parent{l}") for l in range(len(self.num_classes) - 1))
        average = self.settings.ham == "mean"
        return _mean(
            instance_alignment(output.attention_logits, output.lse, parents, bags, average)
        )

    def _supcon(self, embeddings: Tensor, leaf: Tensor, progress: float, gather: bool) -> Tensor:
        kind, tau = self.settings.supcon, self.settings.tau
        if kind == "released":
            now = tau_released(progress, tau)
            return contrastive_released(embeddings, leaf, now, tau, gather=gather)
        levels = Levels(
            self.get_buffer("contrasted"),
            Nodes(self.get_buffer("member"), self.get_buffer("node_level")),
            self.get_buffer("level_weights"),
        )
        return contrastive(embeddings, leaf, tau, levels, self.memory, gather=gather)

    def _constant(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, persistent=False)

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
        rows = output.embeddings
        if self.memory is not None and rows is not None and rows.shape[1] != classes[-1]:
            raise ValueError(
                f"output.embeddings has {rows.shape[1]} rows a bag, the tree {classes[-1]} leaves; "
                "return one row per leaf, or set supcon_memory=0"
            )
        if epochs < 1:
            raise ValueError(f"epochs is {epochs}; give a positive number")


def _mean(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).mean()


def _balanced(counts: Sequence[int] | None, leaves: int) -> Tensor:
    """Per leaf n / (classes · n of the leaf), of mean 1 over the slides; 0 without slides."""
    if counts is None or len(counts) != leaves:
        raise ValueError(f"leaf_counts is {counts}; give the training slides of {leaves} leaves")
    count = torch.tensor(counts, dtype=torch.float64)
    return torch.where(count > 0, count.sum() / ((count > 0).sum() * count.clamp_min(1)), 0)
