"""Print the table of the kernels' benchmark, and whether the fused kernels are worth keeping."""

from typing import Any

RIVALS = (
    "clean", "clean compile", "folded", "folded compile", "padded", "by bag", "ours", "fused",
)  # fmt: skip
WANTED = 1.2  # fused over folded + torch.compile, forward, core, bf16: else fusing is not worth it

Row = dict[str, Any]


def render(known: dict[str, Any], rows: list[Row], asked: int) -> str:
    """The table in Markdown, most of it numbers; failures and the verdict below."""
    rows = sorted(rows, key=_order)
    ceilings = ", ".join(_ceiling(*pair) for pair in known["ceilings"].items())
    head = (
        f"{known['device']}, {known['threads']} threads, Python {known['python']}, torch "
        f"{known['torch']}, Triton {known['triton']}, {known['date']}. Measured ceilings: "
        f"{ceilings}."
    )
    unit = "ms" if known["kind"] == "cuda" else "ms of CPU time, of all threads"
    legend = (
        f"{unit}, median of turns; × is the time of that rival over the best of ours (fused where "
        "it runs). floor: least time by formula at the ceilings, over the best of ours. MiB: peak "
        "beyond the inputs, clean (or folded) eager and ours."
    )
    lines = [
        head,
        "",
        legend,
        "",
        "| case | " + " | ".join(RIVALS) + " | ×clean | ×clean compile | ×folded compile | floor"
        " | MiB |",
        "|---" * (len(RIVALS) + 6) + "|",
        *(_line(row) for row in rows),
    ]
    failures = [
        f"- {row['case']}, {name}: {found['failed']}"
        for row in rows
        for name, found in row["rivals"].items()
        if "failed" in found
    ]
    if failures:
        lines += ["", "Failed:", *_merged(failures)]
    if len(rows) < asked:
        lines += ["", f"Out of time: {asked - len(rows)} of {asked} cases were not run."]
    return "\n".join([*lines, "", verdict(known, rows)])


def verdict(known: dict[str, Any], rows: list[Row]) -> str:
    """The kill criterion of the fused kernels, on the cases that it names."""
    text = f"Kill criterion (fused forward ≥ {WANTED}× folded + compile at D=256, H=320, bf16): "
    if known["kind"] != "cuda":
        return text + "not measured, there is no GPU."
    ratios = {}
    for row in rows:
        named = (row["family"], row["phase"], row["dtype"]) == ("core", "forward", "bf16")
        if named and row["rows"] >= 100_000 and row["bags"] == 1:
            ratios[row["rows"]] = _ratio(row, "folded compile", "fused")
    known_ratios = {n: ratio for n, ratio in ratios.items() if ratio is not None}
    if not known_ratios:
        return text + "not measured, a side of it failed or was not run (see above)."
    said = ", ".join(f"{ratio:.2f}× at N = {n:,}" for n, ratio in sorted(known_ratios.items()))
    kept = min(known_ratios.values()) >= WANTED
    return text + f"{said}: " + ("met, keep fusing." if kept else "NOT met, do not ship fusing.")


def best_of_ours(row: Row) -> str:
    """The name under which ours is judged: fused where it ran."""
    return "fused" if "ms" in row["rivals"].get("fused", {}) else "ours"


def _order(row: Row) -> tuple[int, str, str, int, int]:
    families = ("hmil", "core", "pool", "alignment", "supcon")
    return families.index(row["family"]), row["dtype"], row["phase"], row["rows"], row["bags"]


def _line(row: Row) -> str:
    ours = best_of_ours(row)
    cells = [_cell(row["rivals"].get(name)) for name in RIVALS]
    ratios = [
        _times(_ratio(row, name, ours)) for name in ("clean", "clean compile", "folded compile")
    ]
    mine = row["rivals"].get(ours, {})
    share = f"{mine['floor_share']:.2f}" if "floor_share" in mine else "–"
    eager = row["rivals"].get("clean") or row["rivals"].get("folded") or {}
    memory = f"{_mib(eager)} / {_mib(mine)}"
    head = f"{row['family']} {row['phase']} {row['dtype']} {_short(row['rows'])}/{row['bags']}"
    return "| " + " | ".join([head, *cells, *ratios, share, memory]) + " |"


def _cell(found: Row | None) -> str:
    if found is None:
        return "–"
    return f"{found['ms']:.3g}" if "ms" in found else "failed"


def _ratio(row: Row, rival: str, ours: str) -> float | None:
    pair = [row["rivals"].get(name, {}).get("ms") for name in (rival, ours)]
    return None if None in pair else float(pair[0] / pair[1])


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}"


def _mib(found: Row) -> str:
    peak = found.get("peak_mib")
    return "–" if peak is None or "ms" not in found else f"{peak:.0f}"


def _short(count: int) -> str:
    for size, letter in ((1_000_000, "M"), (1000, "k")):
        if count >= size and count % size == 0:
            return f"{count // size}{letter}"
    return str(count)


def _ceiling(name: str, rate: float) -> str:
    if name == "bytes":
        return f"copy {rate / 1e9:.3g} GB/s"
    return f"{name} {rate / 1e12:.3g} TFLOP/s"


def _merged(failures: list[str], most: int = 12) -> list[str]:
    left = len(failures) - most
    return failures[:most] + ([f"- and {left} more, in the JSON"] if left > 0 else [])
