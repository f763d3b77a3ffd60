"""Draw the report's charts as SVG: ROC, reliability, training curves."""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from hmil_fast.fonts import figure_fonts
from hmil_fast.metrics import flat_metrics, reliability_bins

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_INK, _QUIET, _GRID, _LINE = "#1b1f24", "#59636e", "#e4e7eb", "#c8ccd2"
# Okabe and Ito's colours, without the yellow that white paper swallows
_CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_GUIDE, _BARS = "#b1b8c0", "#9fb6c9"
# what the page sets anew where it is dark; the other colours stand on both
_THEMED = {
    _INK: "ink", _QUIET: "quiet", _GRID: "grid", _LINE: "line", _GUIDE: "guide", _BARS: "bars",
    "#0072B2": "blue", "#D55E00": "orange", "#000000": "black",
}  # fmt: skip
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))


def roc_chart(y: Ints, p: Floats, names: Sequence[str], label: str = "ROC curves") -> Markup:
    """One-vs-rest ROC curve of every class that has positives and negatives, with its AUC."""
    from sklearn.metrics import roc_curve

    few = len(names) <= 8
    size = (3.75, 3.95) if few else (7.3, max(3.95, 0.4 + 0.165 * len(names)))
    with _figure(*size) as figure:
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=_GUIDE, linewidth=1, linestyle=(0, (2, 2)))
        handles, labels = [], []
        for c, name in enumerate(names):
            positive = np.asarray(y) == c
            if positive.all() or not positive.any():
                continue
            false, true, _ = roc_curve(positive, p[:, c])
            area = flat_metrics(positive.astype(np.int64), np.stack([1 - p[:, c], p[:, c]], 1))
            handles += axes.plot(
                false,
                true,
                color=_CYCLE[c % len(_CYCLE)],
                linestyle=_DASHES[c // len(_CYCLE) % len(_DASHES)],
                linewidth=1.8,
            )
            # the number first: a label that begins with "_" would be hidden
            labels.append(f"{area['auc']:.3f}  {_short(name)} (n={positive.sum()})")
        axes.set(
            xlim=(-0.01, 1.01),
            ylim=(-0.01, 1.01),
            aspect="equal",
            xlabel="false positive rate",
            ylabel="true positive rate",
            title="ROC, one class against the rest",
        )
        if few:
            axes.legend(handles, labels, loc="lower right", title="AUC", alignment="left")
        else:
            figure.legend(handles, labels, loc="outside right upper", title="AUC", alignment="left")
        return _svg(figure, label)


def reliability_chart(y: Ints, p: Floats, label: str = "reliability diagram") -> Markup:
    """Share of hits against the predicted class's probability, in ten bins."""
    edges, mean, accuracy, count = reliability_bins(y, p)
    filled = count > 0
    with _figure(3.75, 3.95) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        upper.plot([0, 1], [0, 1], color=_GUIDE, linewidth=1, linestyle=(0, (2, 2)))
        upper.vlines(mean[filled], mean[filled], accuracy[filled], color="#D55E00", linewidth=1.5)
        area = 20 + 180 * count[filled] / max(1, count.max())
        upper.scatter(
            mean[filled],
            accuracy[filled],
            s=area,
            color="#0072B2",
            linewidth=0,
            zorder=3,
            clip_on=False,
        )
        upper.set(
            ylim=(-0.02, 1.02), ylabel="share correct", title="Reliability (orange: gap to perfect)"
        )
        lower.bar(edges + 0.05, count, width=0.09, color=_BARS)
        lower.set(xlim=(-0.01, 1.01), ylabel="slides", xlabel="probability of the predicted class")
        return _svg(figure, label)


def curves_chart(epochs: Sequence[Mapping[str, Any]]) -> Markup:
    """Loss, validation and loss terms by epoch; one thin line per fold, the mean of folds thick.

    Args:
        epochs: The epoch records of log.jsonl.
    """
    losses = {"train": _series(epochs, "loss"), "validation": _series(epochs, "val_loss")}
    scores = {"validation": _series(epochs, "val_balanced_accuracy")}
    names = dict.fromkeys(n for e in epochs for n in e.get("terms") or {} if n != "total")
    terms = {
        name: _series([{**e, **e["terms"]} for e in epochs if e.get("terms")], name)
        for name in names
    }
    panels = [
        ("Loss", losses),
        ("Balanced accuracy", scores),
        ("Loss terms, before weighting", terms),
    ]
    panels = [(title, {k: v for k, v in lines.items() if v}) for title, lines in panels]
    panels = [(title, lines) for title, lines in panels if lines]
    with _figure(3.95 * max(1, len(panels)), 3.1) as figure:
        for place, (title, lines) in enumerate(panels, start=1):
            axes = figure.add_subplot(1, len(panels), place)
            handles = []
            for colour, folds in zip(_cycled(len(lines)), lines.values(), strict=True):
                if len(folds) > 1:
                    for values in folds.values():
                        axes.plot(
                            *zip(*sorted(values.items()), strict=True),
                            color=colour,
                            linewidth=0.8,
                            alpha=0.35,
                        )
                reached = sorted({epoch for values in folds.values() for epoch in values})
                mean = [np.mean([v[e] for v in folds.values() if e in v]) for e in reached]
                handles += axes.plot(
                    reached,
                    mean,
                    color=colour,
                    linewidth=2,
                    marker="o" if len(reached) == 1 else "",
                )
            axes.set(title=title, xlabel="epoch")
            axes.legend(handles, [f" {name}" for name in lines])
        return _svg(figure, "training curves")


def _series(epochs: Sequence[Mapping[str, Any]], name: str) -> dict[int, dict[int, float]]:
    """Finite values by fold and epoch; of an epoch logged twice (a resumed run) the later."""
    folds: dict[int, dict[int, float]] = {}
    for record in epochs:
        value = record.get(name)
        if isinstance(value, int | float) and np.isfinite(value):
            folds.setdefault(int(record["fold"]), {})[int(record["epoch"])] = float(value)
    return folds


def _cycled(n: int) -> list[str]:
    return [_CYCLE[i % len(_CYCLE)] for i in range(n)]


def _short(name: str) -> str:
    return name if len(name) <= 22 else name[:12] + "…" + name[-9:]


@contextmanager
def _figure(width: float, height: float) -> "Iterator[Figure]":
    """A figure in the report's style; names are text, never formulas."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "text.parse_math": False,
        "svg.fonttype": "none",  # the browser's letters: sharp, searchable, any script
        "svg.hashsalt": "hmil-fast",
        "font.family": figure_fonts(),
        "font.size": 8.5,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.edgecolor": _LINE,
        "axes.labelcolor": _QUIET,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": _GRID,
        "grid.linewidth": 0.8,
        "text.color": _INK,
        "xtick.color": _QUIET,
        "ytick.color": _QUIET,
        "legend.frameon": False,
        "legend.fontsize": 8,
    }
    with mpl.rc_context(style):
        yield Figure(figsize=(width, height), layout="constrained")


def _svg(figure: "Figure", label: str) -> Markup:
    """The figure as an element in the page's colours and letters; matplotlib escapes names."""
    file = io.StringIO()
    with warnings.catch_warnings():  # letters that our font lacks: the browser has them
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(
            file, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = file.getvalue()
    text = text[text.index("<svg") :]
    # as part of a page: no metadata, no rules and no background of its own
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    for colour, name in _THEMED.items():
        text = re.sub(rf"{colour}\b(?=[^<>]*>)", f"var(--{name})", text, flags=re.IGNORECASE)
    opening = Markup('<svg role="img" aria-label="{}"').format(label)
    return opening + Markup(text.removeprefix("<svg"))  # noqa: S704
