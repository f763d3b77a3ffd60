"""Run whole commands: extraction beside its encoder alone, and training of one cohort."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch

from bench.first_gpu.journal import device, dry, folder, say, wait
from hmil_fast.extraction.encoders import load_encoder


def encoder() -> None:
    """Tiles a second of the encoder alone, on batches that lie on the device."""
    name = (folder() / "vit.name").read_text()
    made = load_encoder(name, folder() / "vit.safetensors", device())
    size, count = (4, 2) if dry() else (256, 20)
    batches = [
        torch.randn(size, 3, 224, 224, device=device()).contiguous(
            memory_format=torch.channels_last
        )
        for _ in range(2)
    ]
    for batch in batches:
        made(batch)
    wait()
    began = time.perf_counter()
    for k in range(count):
        made(batches[k % 2])
    host = time.perf_counter() - began
    wait()
    took = time.perf_counter() - began
    say("encoder", name=name, precision=made.precision, tiles_per_s=size * count / took,
        host_ms_per_batch=1e3 * host / count)  # fmt: skip


def extract(codec: str, decode: str) -> None:
    """`hmil-fast extract` of the slide, with the use of the GPU each 0.2 s."""
    if dry() and decode == "gpu":
        say("extract", codec=codec, decode=decode, needs="a GPU")
        return
    store = folder() / f"store-{codec}-{decode}"
    with _usage() as log:
        code, took, said = _cli(
            "extract", folder() / f"{codec}.tif", "--store", store,
            "--encoder", (folder() / "vit.name").read_text(),
            "--weights", folder() / "vit.safetensors",
            "--tile-size", 224, "--mpp", 0.5, "--min-tissue", 0, "--no-preflight",
            "--decode", decode, "--device", "cpu" if dry() else "auto",
        )  # fmt: skip
    used = [int(line.split(",")[0]) for line in log.read_text().splitlines() if line.strip()]
    on = [use for use in used if use > 0]
    from hmil_fast.io.store import open_store

    facts: dict[str, object] = {}
    if code == 0:
        record = open_store(store).record(codec)
        facts = {"tiles": record.num_tiles, "decoded": record.attrs.get("decoded")}
    say(
        "extract", codec=codec, decode=decode, code=code, seconds=took,
        busy_mean_while_on=sum(on) / max(len(on), 1), samples=len(on), **facts, said=said[-2500:],
    )  # fmt: skip


def train() -> None:
    """200 epochs of two folds on bags of BRACS's size."""
    run, epochs = folder() / "run", 2 if dry() else 200
    code, took, said = _cli(
        "train", "--store", folder() / "bags", "--labels", folder() / "labels.csv",
        "--tree", folder() / "tree.yaml", "--out", run, "folds=2", f"epochs={epochs}",
        "baseline=none", f"device={'cpu' if dry() else 'auto'}",
    )  # fmt: skip
    log = run / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    rates = [line["instances_per_s"] for line in lines if line.get("event") == "epoch"]
    say(
        "train", code=code, seconds=took, epochs=len(rates),
        instances_per_s=median(rates) if rates else None, said=said[-1500:] if code else "",
    )  # fmt: skip


@contextmanager
def _usage() -> Iterator[Path]:
    log = folder() / "usage.csv"
    log.write_text("")
    if dry():
        yield log
        return
    query = "utilization.gpu,utilization.memory,memory.used"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "-lms", "200"]
    with log.open("w") as file:
        watch = subprocess.Popen(command, stdout=file)
        try:
            yield log
        finally:
            watch.terminate()
            watch.wait()


def _cli(*arguments: object) -> tuple[int, float, str]:
    began = time.time()
    command = [sys.executable, "-m", "hmil_fast.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, time.time() - began, done.stdout + done.stderr
