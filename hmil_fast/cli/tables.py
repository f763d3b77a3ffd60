"""Tables on the terminal: the metrics of a run, the comparison of two."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hmil_fast.evaluation.tables import comparison_rows, metric_rows


def print_metrics(metrics: dict[str, Any]) -> None:
    """Print metrics.json as a table, the baseline's column beside the model's."""
    pooled = metrics["pooled"]
    title = f"{pooled['slides']} slides of {pooled['patients']} patients, [95 % interval]"
    console = Console()
    console.print(_table(title, *metric_rows(metrics)))
    if "conformal" in metrics:
        console.print(f"conformal answers: {metrics['conformal']['note']}", markup=False)


def print_comparison(result: dict[str, Any]) -> None:
    """Print what `hmil_fast.evaluation.compare.compare_runs` returns, a table per comparison."""
    console = Console()
    for comparison in result["comparisons"]:
        runs = (result["runs"][comparison[side]] for side in ("first", "second"))
        a, b = (f"{escape(r['path'])} ({r['model']}, {r['preset']})" for r in runs)
        title = (
            f"A: {a}\nB: {b}\n{result['slides']} slides of {result['patients']} patients, "
            "paired by patient; Holm over the tested metrics, * < 0.05"
        )
        rows = comparison_rows(comparison, result["levels"])
        # without spaces beside the lines, names and numbers fit 80 columns
        console.print(_table(title, *rows, padding=0, justify="right"))
    for note in result["notes"]:
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def _table(
    title: str,
    heading: Sequence[str],
    rows: Sequence[Sequence[str]],
    padding: int | None = None,
    justify: Any = "left",
) -> Table:
    table = Table(title=title, title_justify="left", padding=(0, 1) if padding is None else padding)
    table.add_column(heading[0])
    for name in heading[1:]:
        table.add_column(name, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
