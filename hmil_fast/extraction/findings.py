"""What `doctor` finds: a check's result, and those of the GPUs: decoders and kernels."""

import warnings
from dataclasses import dataclass

import torch

from hmil_fast.io.slide.device_decoder import DeviceDecoder
from hmil_fast.io.slide.sources import Unsuited
from hmil_fast.kernels.dispatch import Choice, choose


@dataclass(frozen=True)
class Finding:
    """A check's result: its state ("ok", "note" or "bad"), what it found, and the fix."""

    state: str
    what: str
    fix: str = ""


def decoder_findings() -> list[Finding]:
    """What decodes tiles on each GPU."""
    findings = []
    for i in range(torch.cuda.device_count()):
        try:
            decoder = DeviceDecoder(torch.device("cuda", i))
        except Unsuited as why:
            text = 'run pip install "hmil-fast[cu13]" (or [cu12]); until then the CPU decodes'
            findings.append(Finding("note", f"GPU {i} decodes no tiles: nvImageCodec: {why}", text))
        else:
            by = " and ".join(dict.fromkeys(decoder.names()))
            findings.append(Finding("ok", f"GPU {i} decodes tiles by {by}"))
    return findings


def kernel_findings() -> list[Finding]:
    """Which kernels run on each GPU, or on the CPU, and why; checks a GPU that was not checked."""
    gpus = range(torch.cuda.device_count())
    devices = [torch.device("cuda", i) for i in gpus] or [torch.device("cpu")]
    findings = []
    for device in devices:
        where = f"kernels on GPU {device.index}" if gpus else "kernels"
        try:
            with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
                choice = choose(device)  # what it warns of, the finding says
        except ValueError as error:
            findings.append(Finding("bad", f"{where}: {error}", "set it, or unset it, as it says"))
        else:
            findings.append(kernel_finding(where, choice))
    return findings


def kernel_finding(where: str, choice: Choice) -> Finding:
    """A choice between the fused kernels and the reference, with the numbers that decided it."""
    what, verdict = f"{where}: {choice.name}, {choice.why}", choice.verdict
    if verdict is None:
        return Finding("ok", what)
    what += f" ({verdict.text()}); {verdict.place}"
    if verdict.passed:
        return Finding("ok", what)
    fix = "results are right, but slower: report this line; a check that was kept is made again "
    return Finding("note", what, f"{fix}when its file is deleted")
