"""Write what was found as JSON and as a table, with the constants that it would set."""

import json
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton

from bench.first_gpu import journal
from hmil_fast.extraction.pipeline.attributes import software

Result = dict[str, Any]


def write(place: Path, name: str, seconds: float) -> None:
    """Write first-gpu.json and first-gpu.md into a folder, which is made."""
    found = journal.results()
    facts = {
        "device": name,
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "software": software(journal.device()) | {"triton": triton.__version__},
        "seconds": round(seconds),
    }
    kernels = journal.folder() / "kernels.json"
    place.mkdir(parents=True, exist_ok=True)
    whole = {
        "machine": facts,
        "results": found,
        "kernels": json.loads(kernels.read_text()) if kernels.exists() else None,
        "constants": constants(found),
    }
    (place / "first-gpu.json").write_text(json.dumps(whole, indent=1) + "\n")
    (place / "first-gpu.md").write_text("\n".join(lines(facts, found)) + "\n")


def constants(found: list[Result]) -> dict[str, Any]:
    """What the measurements would set, by where it stands; None where nothing was measured."""
    proofs = [r for r in found if r["step"] == "ended" and r["name"].startswith("numerics")]
    fused = [r for r in found if r["step"] == "step" and r["kernels"] == "fused"]
    plain = {r["rows"]: r for r in found if r["step"] == "step" and r["kernels"] == "reference"}
    transform = {r["backend"]: r["tiles_per_s"] for r in found if r["step"] == "transform"}
    return {
        "decode_choice.CPU_TILES_PER_S": {
            codec: best(found, codec, "cpu", threads=1) for codec in ("jpeg", "jpeg2000")
        },
        "decode_choice: tiles/s of the device": {
            codec: best(found, codec, "device") for codec in ("jpeg", "jpeg2000")
        },
        "decode_choice: seconds of extract, cpu and gpu": {
            codec: [seconds(found, codec, decode) for decode in ("cpu", "gpu")]
            for codec in ("jpeg", "jpeg2000")
        },
        "device_band: the host must wait": [
            r["written_before_its_turn"] > 0 for r in found if r["step"] == "order" and "of" in r
        ]
        or None,
        "transform.build_transform: quicker where nothing is resized": max(
            transform, key=lambda name: transform[name], default=None
        ),
        "dispatch.choose: proofs passed": all(r["code"] == 0 for r in proofs) if proofs else None,
        "dispatch.choose: step, reference ÷ fused": {
            r["rows"]: round(plain[r["rows"]]["wall_ms"] / r["wall_ms"], 2)
            for r in fused
            if r["rows"] in plain
        },
    }


def best(found: list[Result], codec: str, on: str, threads: int | None = None) -> float | None:
    """The highest rate of a codec, in tiles/s."""
    rates = [
        r["tiles_per_s"]
        for r in found
        if r["step"] == "rate"
        and (r["codec"], r["on"]) == (codec, on)
        and threads in (None, r.get("threads"))
    ]
    return round(max(rates)) if rates else None


def seconds(found: list[Result], codec: str, decode: str) -> float | None:
    """What a whole extraction took."""
    for r in found:
        if r["step"] == "extract" and (r["codec"], r["decode"]) == (codec, decode):
            return round(r["seconds"], 1) if r.get("code") == 0 else None
    return None


def lines(facts: dict[str, Any], found: list[Result]) -> Iterator[str]:
    """The table that people read."""
    yield f"# First minutes on {facts['device']}, {facts['date']}"
    yield ""
    used = ", ".join(f"{name} {release}" for name, release in facts["software"].items())
    yield f"Python {facts['python']}, {used}; {facts['seconds']} s in all."
    yield ""
    yield "| step | result |"
    yield "|---|---|"
    for result in found:
        yield f"| {result['step']} | {_cell(result)} |"
    yield ""
    yield "| constant | by these numbers |"
    yield "|---|---|"
    for name, value in constants(found).items():
        yield f"| {name} | {'not measured' if value is None else value} |"
    if torch.cuda.is_available():
        yield ""
        yield "The kernels' table is in first-gpu.json."


def _cell(result: Result) -> str:
    hidden = ("step", "at", "said", "tail", "longest")
    facts = {k: v for k, v in result.items() if k not in hidden}
    texts = [f"{k} {_number(v)}" for k, v in facts.items()]
    if result["step"] == "ended" and result["code"] != 0:
        texts += [str(result["tail"][-1:])]
    return ", ".join(texts).replace("|", "\\|")


def _number(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
