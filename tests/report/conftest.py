"""Run folders of made-up predictions, whose names a test chooses; a browser."""

import base64
import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hmil_fast.labels import LabelTree
from hmil_fast.metrics import all_levels, decide, evaluate_predictions
from hmil_fast.report.html.data import view_file


@pytest.fixture(scope="session")
def made_up_run() -> Callable[..., Path]:
    """`make_up_run`: a run folder that is as quick to make as to write."""
    return make_up_run


def make_up_run(
    run: Path, tree: LabelTree, slide_id: str, folds: int = 2, baseline: bool = True
) -> Path:
    """A run folder of 24 slides with made-up predictions, for a tree of four leaves.

    The first slide is called `slide_id` and has a view.
    """
    rng = np.random.default_rng(0)
    y = np.arange(24) % 4
    p = rng.dirichlet(np.ones(4), 24) + 0.4 * np.eye(4)[y]
    p /= p.sum(axis=1, keepdims=True)
    levels, answers = all_levels(tree, p), decide(tree, p).nodes
    ids = [slide_id, *(f"slide {i}" for i in range(1, 24))]
    patients = [f"P{i // 2}" for i in range(24)]
    fold = np.arange(24) // 2 % folds
    (run / "views").mkdir(parents=True)
    (run / "tree.json").write_text(json.dumps(tree.to_dict()))
    pooled = evaluate_predictions(tree, y, p, patients, draws=50)
    metrics = {"model": "hmil", "pooled": pooled, "folds": []}
    for f in range(folds):
        mine = np.flatnonzero(fold == f)
        owners = [patients[i] for i in mine]
        metrics["folds"].append(evaluate_predictions(tree, y[mine], p[mine], owners, draws=0))
    if baseline:
        metrics["baseline"] = {"model": "mean<b>", "pooled": pooled}
    (run / "metrics.json").write_text(json.dumps(metrics))
    with (run / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = [
            f"p{level}_{n}" for level, level_names in enumerate(tree.names) for n in level_names
        ]
        writer.writerow(
            ["slide_id", "patient_id", "fold", "label", "prediction", "num_tiles", *names]
        )
        for i in range(24):
            guess = tree.leaves[answers[-1, i]]
            writer.writerow(
                [ids[i], patients[i], fold[i], tree.leaves[y[i]], guess, 1000 - 37 * i]
                + [float(q) for level in levels for q in level[i]]
            )
    lines = [
        {"event": "epoch", "fold": f, "epoch": e, "loss": 2 / (e + 1), "terms": {"ce": 1.0},
         "val_loss": 1.0, "val_balanced_accuracy": 0.5, "seconds": 1.0}
        for f in range(folds) for e in range(3)
    ]  # fmt: skip
    text = "\n".join(json.dumps(line) for line in [{"event": "start"}, *lines])
    (run / "log.jsonl").write_text(text + '\n{"event": "epo')
    (run / "config.yaml").write_text("epochs: 3\nnote: </pre><script>alert(1)</script>\n")
    write_made_up_view(run, slide_id, [[float(q) for q in level[0]] for level in levels])
    return run


def write_made_up_view(run: Path, slide_id: str, probabilities: list[list[float]]) -> None:
    """A view of four tiles and one map."""
    file = io.BytesIO()
    Image.effect_noise((90, 60), 60).convert("RGB").save(file, "WEBP")
    picture = base64.b64encode(file.getvalue()).decode()
    corners = np.array([[0, 0], [100, 0], [0, 100], [100, 100]], "<u2")
    view = {
        "slide_id": slide_id, "probabilities": probabilities, "size": [900, 600], "mpp": 0.5,
        "side": 100.0, "tiles": 4, "picture": picture, "small": picture, "limit": 8.0, "unit": 1.0,
        "cells": base64.b64encode(corners.tobytes()).decode(), "cell_side": 100.0, "cut": True,
        "cuts": {}, "note": "</script><b>",
        "maps": [{"level": 1, "node": 0, "spread": "", "places": dict.fromkeys(
            ("share", "rank"), base64.b64encode(b"\x00\x40\xfe\xff").decode()),
                  "top": [[2, 0, 100, 0.75]]}],
    }  # fmt: skip
    view_file(run, slide_id).write_text(json.dumps(view))


FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-quic", "--no-first-run", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip

# the browser reads descriptor 3 and writes 4, whatever numbers the pipes have here
START = """
import fcntl, os, sys
for want, pipe in enumerate([fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3]], 3):
    os.dup2(pipe, want)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """Headless Chromium behind its DevTools pipe: JSON messages ended by a zero byte."""

    def __init__(self, program: str, profile: Path) -> None:
        there, self._write = os.pipe()
        self._read, back = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, str(there), str(back), program, *FLAGS,
             f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(there, back), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(there)
        os.close(back)
        self._numbers, self._pending, self._session = count(1), b"", ""
        self.logged: list[str] = []
        self.fetched: list[str] = []
        page, end = None, time.monotonic() + 600
        while page is None:  # a busy machine takes its time to open the first one
            assert time.monotonic() < end, "no page was opened"
            targets = self.call("Target.getTargets")["targetInfos"]
            page = next((target for target in targets if target["type"] == "page"), None)
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command; what happens until its answer is noted down."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != number:
            self._note(answer.get("method", ""), answer.get("params", {}))
        assert "error" not in answer, answer["error"]
        return dict(answer["result"])

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._pending:
            data = os.read(self._read, 1 << 20)
            assert data, "the browser has gone"
            self._pending += data
        message, _, self._pending = self._pending.partition(b"\0")
        return dict(json.loads(message))

    def _note(self, event: str, params: dict[str, Any]) -> None:
        if event == "Runtime.consoleAPICalled":
            self.logged.append(str(params["args"]))
        elif event == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.logged.append(details.get("exception", {}).get("description", details["text"]))
        elif event == "Log.entryAdded":
            self.logged.append(params["entry"]["text"])
        elif event == "Network.requestWillBeSent":
            self.fetched.append(params["request"]["url"][:100])

    def open(self, page: Path, fragment: str = "", size: tuple[int, int] = (1280, 900)) -> None:
        """Load a file as a person would, from its file:// address."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=size[0], height=size[1], deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=page.as_uri() + fragment)
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def do(self, script: str) -> Any:
        """The value of an expression in the page."""
        said = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True,
            userGesture=True,
        )  # fmt: skip
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    def wait(self, condition: str, seconds: float = 600) -> None:
        """Until an expression holds."""
        end = time.monotonic() + seconds
        while not self.do(f"Boolean({condition})"):
            assert time.monotonic() < end, f"never: {condition}"
            time.sleep(0.02)

    def key(self, name: str) -> None:
        """Press a key where the focus is."""
        text = {"text": name} if len(name) == 1 else {"text": "\r"} if name == "Enter" else {}
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowRight": 39, "ArrowDown": 40}
        code = {"windowsVirtualKeyCode": codes[name]} if name in codes else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=name, **text, **code)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=name, **code)

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """A mouse event at a place of the window."""
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def close(self) -> None:
        """End the browser."""
        os.close(self._write)  # it leaves with its pipe
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    started = Browser(program, tmp_path_factory.mktemp("profile"))
    yield started
    started.close()
