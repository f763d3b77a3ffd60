"""Print what extraction commands return: findings, the summary of a job, the status of a store."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from hmil_fast.extraction.doctor import SlideReport
from hmil_fast.extraction.findings import Finding
from hmil_fast.extraction.jobs.summary import JobSummary
from hmil_fast.extraction.preflight import nbytes

SIGNS = {"ok": "[green]✓[/]", "note": "[yellow]![/]", "bad": "[red]✗[/]"}
_NAMED = 3  # slides that a line names


def print_findings(findings: Sequence[Finding]) -> None:
    """Print findings, a line each, with their fixes."""
    out = Console(soft_wrap=True, highlight=False)
    for finding in findings:
        out.print(f"{SIGNS[finding.state]} ", end="")
        out.print(finding.what, markup=False)
        if finding.fix:
            out.print(f"  Fix: {finding.fix}", markup=False, style="dim")


def print_slides(slides: Sequence[SlideReport]) -> None:
    """Print what `doctor` says of slides, a line each."""
    for s in slides:
        if s.error is not None:
            print_findings([Finding("bad", f"{s.slide_id}: {s.error}", s.fix or "")])
            continue
        time_left = "" if s.seconds is None else f", about {max(s.seconds, 1):.0f} s"
        scales = ((s.level, s.mpp_effective), *s.coarser)
        levels, mpps = (
            " and ".join(f"{each:.4g}" for each in x) for x in zip(*scales, strict=True)
        )
        text = (
            f"{s.slide_id}: {s.reader}, {s.codec}, {s.size[0]}×{s.size[1]} px in {s.levels} "
            f"level{'s' * (s.levels > 1)}, {s.mpp:.4g} µm/px from {s.mpp_source}; reads level "
            f"{levels}, tiles of {mpps} µm/px: {s.tiles:,} tiles, "
            f"{nbytes(s.bytes)}{time_left}; {s.reader_reason}"
        )
        note = f" ({s.note})" if s.note else ""
        print_findings([Finding("note" if note else "ok", text + note, s.fix or "")])


def print_summary(summary: JobSummary, err: Console) -> None:
    """Print the summary of a job, and where its time went if that is known."""
    out = Console(soft_wrap=True, highlight=False)
    made = len(summary.results) - len(summary.failed)
    tiles = sum(result.num_tiles for result in summary.results.values())
    seconds, others = summary.seconds, summary.elsewhere
    rate = f" ({tiles:,} tiles in {seconds:.1f} s, {tiles / seconds:,.1f} tiles/s)" if tiles else ""
    # stored by another job, or by a worker of this job that died before it could report
    more = f"{others} more {'is' if others == 1 else 'are'} in the store, " if others else ""
    out.print(
        f"{made} slides extracted{rate}, {more}{summary.done_before} were done before, "
        f"{len(summary.failed)} failed. Store: {summary.store.path}",
        markup=False,
    )
    if text := undecoded({r.slide_id: r.bad_tiles for r in summary.results.values()}):
        out.print(f"  {text}", markup=False)
    for text in noted({r.slide_id: r.notes for r in summary.results.values()}):
        out.print(f"  {text}", markup=False)
    for result in summary.failed:
        assert result.error is not None
        out.print(
            f"  {result.slide_id}: {result.error.what}\n    Fix: {result.error.fix}", markup=False
        )
    if summary.timings and tiles:
        _print_timings(err, summary.timings, seconds * summary.processes)


def _print_timings(err: Console, seconds: Mapping[str, float], total: float) -> None:
    table = Table("stage", "seconds", "share", title="where the time went", title_justify="left")
    # stages in turn add up; stages "(threads)" and "(GPU)" run beside them
    in_turn = sum(spent for stage, spent in seconds.items() if "(" not in stage)
    rows = dict(seconds) | {"other (starting, waiting)": max(0.0, total - in_turn)}
    for stage, spent in sorted(rows.items(), key=lambda item: -item[1]):
        table.add_row(stage, f"{spent:.2f}", f"{spent / total:.0%}")
    err.print(table)
    if "encode (GPU)" in seconds:
        busy = seconds["encode (GPU)"] / total
        err.print(f"the GPU was busy {busy:.0%} of the time, start-up included", highlight=False)


def print_status(status: Mapping[str, Any]) -> None:
    """Print what `hmil_fast.extraction.jobs.status.read_status` returns."""
    out = Console(soft_wrap=True, highlight=False)
    left = "" if status["left"] is None else f"{status['left']} left, "
    out.print(
        f"{status['committed']} slides in the store, {left}{len(status['failed'])} failed; "
        f"{status['processes']} processes at {status['tiles_per_second']:,.1f} tiles/s",
        markup=False,
    )
    if text := undecoded(status["bad_tiles"]):
        out.print(f"  {text}", markup=False)
    for text in noted(status["notes"]):
        out.print(f"  {text}", markup=False)
    for lease in status["in_work"]:
        since = time.strftime("%H:%M:%S", time.localtime(lease["since"]))
        silent = f", silent for {lease['silent_s']:.0f} s" if lease["dead"] else ""
        out.print(
            f"  {lease['slide_id']}: since {since} by process {lease['pid']} on "
            f"{lease['host']}{silent}",
            markup=False,
        )
    for slide in status["failed"]:
        out.print(f"  {slide['slide_id']}: {slide['error']}\n    Fix: {slide['fix']}", markup=False)


def undecoded(bad_tiles: Mapping[str, int]) -> str:
    """Say how many tiles of how many slides cannot be decoded, and name the worst; "" if none.

    Args:
        bad_tiles: Of each slide.
    """
    bad = sorted((-count, slide_id) for slide_id, count in bad_tiles.items() if count)
    if not bad:
        return ""
    named = ", ".join(f"{slide_id} ({-count:,})" for count, slide_id in bad[:_NAMED])
    tiles, more = -sum(count for count, _ in bad), ", …" if len(bad) > _NAMED else ""
    return (
        f"{tiles:,} tile{'s' * (tiles > 1)} of {len(bad):,} slide{'s' * (len(bad) > 1)} "
        f"cannot be decoded: {named}{more}"
    )


def noted(notes: Mapping[str, Sequence[Sequence[str]]]) -> list[str]:
    """Return one text for each note, with its slides and its fix.

    Args:
        notes: Of each slide, as (what, fix).
    """
    slides: dict[tuple[str, str], list[str]] = {}
    for slide_id, each in sorted(notes.items()):
        for what, fix in each:
            slides.setdefault((what, fix), []).append(slide_id)
    return [
        f"{len(ids):,} slide{'s' * (len(ids) > 1)}: {what}: {', '.join(ids[:_NAMED])}"
        + (", …" if len(ids) > _NAMED else "")
        + (f"\n    Fix: {fix}" if fix else "")
        for (what, fix), ids in slides.items()
    ]
