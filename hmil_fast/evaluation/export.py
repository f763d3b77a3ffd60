"""Write a run's folds as ONNX files, each checked against its model by onnxruntime."""

import json
import logging
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hmil_fast.errors import UsageError
from hmil_fast.evaluation.model_card import fold_card, markdown
from hmil_fast.evaluation.predict import load_fold
from hmil_fast.evaluation.prior import trained_shares
from hmil_fast.files import write_file, write_text
from hmil_fast.metrics import all_levels, balanced_prior, leaf_probabilities
from hmil_fast.models.export_form import PlainHead
from hmil_fast.models.feature_scale import NAME, scaled
from hmil_fast.runs.run import Run

CHECK_SIZES = (1, 2, 37, 500, 5_000)
TOLERANCE = 1e-3  # rounding of large scores is some 1e-5, another formula 1e-1


def export_run(run: Run, out: Path, folds: Sequence[int] | None = None) -> dict[Path, float]:
    """Export the best models of folds, each as one ONNX file with its model card beside it.

    A file takes one bag "x", float32 [n, D] with n ≥ 1, and gives for each level l "logits_<l>" and
    "probabilities_<l>" float32 [K_l], and "attention_<l>" float32 [n, K_l] if the model has
    attention. The probabilities are those of `predict` under the balanced prior. Its
    metadata holds the tree, encoder and tiling as JSON. A file is kept only if onnxruntime computes
    from it what the run's own model computes in float32, on random bags of `CHECK_SIZES` tiles.
    (`predict` may compute in bfloat16, see the setting precision.)

    Args:
        run: A trained run.
        out: Folder for the files, made if missing.
        folds: Which folds, from 0; by default all.

    Returns:
        The files, and the largest difference of any output between onnxruntime and the model:
        absolute for probabilities, else relative to the largest value of that output.

    Raises:
        UsageError: No such fold, one that is not trained, a package is missing, the folder cannot
            be written, or onnxruntime disagrees; a file that disagrees is not kept.
    """
    folds = range(len(run.folds)) if folds is None else folds
    for fold in folds:
        if not 0 <= fold < len(run.folds):
            raise UsageError(
                f"{run.path} has no fold {fold}", f"give --fold 0 to {len(run.folds) - 1}"
            )
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"exporting needs {', '.join(missing)}, not installed here",
            'run `pip install "hmil-fast[export]"`',
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        return dict(_export_fold(run, out, fold) for fold in folds)
    except OSError as error:
        raise UsageError(
            f"cannot write {out}: {error.strerror}", "name a place you can write to"
        ) from None


def _export_fold(run: Run, out: Path, fold: int) -> tuple[Path, float]:
    model = load_fold(run, fold, torch.device("cpu"))
    head = PlainHead(model, run.tree.parents, level_shares(run, fold), summed=run.sums)
    file, card, difference = out / f"fold-{fold}.onnx", fold_card(run, fold), 0.0

    def write(partial: Path) -> None:
        nonlocal difference
        write_onnx(head, run.store["dim"], partial, card)
        difference = largest_difference(run, fold, model, partial)
        if not difference <= TOLERANCE:
            raise UsageError(
                f"onnxruntime differs from the model of fold {fold} by {difference:.1e}, more than "
                f"{TOLERANCE:.0e}",
                "update onnx, onnxscript and onnxruntime, and report it if that does not help",
            )

    write_file(file, write)
    write_text(file.with_suffix(".md"), markdown(card))
    return file, difference


def level_shares(run: Run, fold: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per level the balanced prior of its nodes and the shares that a fold learnt from, [K_l]."""
    prior = all_levels(run.tree, balanced_prior(run.tree)[None])
    return [
        (torch.from_numpy(new[0]).float(), torch.from_numpy(old).float())
        for new, old in zip(prior, trained_shares(run, fold), strict=True)
    ]


def write_onnx(head: PlainHead, dim: int, path: Path, metadata: dict[str, Any]) -> None:
    """Write a head as one ONNX file; `metadata` goes into it as JSON under "hmil_fast"."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it logs the steps of its optimiser
    with redirect_stdout(sys.stderr):  # the exporter prints its progress
        program = torch.onnx.export(
            head,
            (torch.zeros(7, dim),),
            dynamo=True,
            verbose=False,
            input_names=["x"],
            output_names=head.output_names,
            dynamic_shapes={"x": {0: torch.export.Dim("n", min=1)}},
        )
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()  # call stacks with paths of this machine
    program.model.metadata_props["hmil_fast"] = json.dumps(metadata)
    program.save(str(path), external_data=False)


@torch.inference_mode()
def largest_difference(run: Run, fold: int, model: nn.Module, file: Path) -> float:
    """How far onnxruntime, on a CPU, is from the run's own model on random bags.

    Returns:
        As `export_run` says; NaN if an output is no number.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(CHECK_SIZES), run.store["dim"], generator=generator)
    ends = torch.tensor([0, *CHECK_SIZES]).cumsum(0).tolist()
    bags = torch.tensor([(start, end - start) for start, end in pairwise(ends)])
    scale = getattr(model, NAME, None)
    if scale is not None:  # as features of the cohort lie
        x = torch.where(scale.factor > 0, x / scale.factor, 0.0) + scale.mean
    # packed, so that the file is compared with the path that trained the model
    output = model(scaled(model, x), bags)
    differences = []
    for b, (start, end) in enumerate(pairwise(ends)):
        logits = [level[b] for level in output.logits]
        softmax = [torch.softmax(level, 0)[None].numpy() for level in logits]
        shares = trained_shares(run, fold)
        leaf = leaf_probabilities(run.tree, softmax, shares, heads=not run.sums)
        probabilities = [torch.from_numpy(p[0]) for p in all_levels(run.tree, leaf)]
        maps = [
            (scores[start:end] - lse[b]).exp()
            for scores, lse in zip(output.attention_logits, output.lse, strict=True)
        ]
        names = [output.name for output in session.get_outputs()]
        outputs = session.run(names, {"x": x[start:end].numpy()})
        expected = [*logits, *probabilities, *maps]
        for name, value, expected_value in zip(names, outputs, expected, strict=True):
            size = 1.0 if name.startswith("prob") else float(expected_value.abs().max())
            differences.append(float((torch.from_numpy(value) - expected_value).abs().max()) / size)
    return float(np.max(differences))  # NaN if one is
