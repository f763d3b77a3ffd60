"""Encoders of other packages, as installed: those that work, and those that do not."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from hmil_fast.errors import UsageError
from hmil_fast.extraction.encoders import find_card, load_encoder, plugins
from hmil_fast.io.store import open_store

CPU = torch.device("cpu")
SlideFile = Callable[[str], Path]

MODULE = """
import torch
from hmil_fast.extraction.encoders import EncoderCard

class Mean(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(3))
    def forward(self, tiles):
        if len(tiles) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tiles.mean((2, 3)) @ self.weight

def toy(): return EncoderCard("toy", "test_vit", 64, resize_px=160, input_px=160)
def mean(): return EncoderCard("mean", "mean", 3, resize_px=32, input_px=32), Mean()
def fails(): raise RuntimeError("no licence found\\nsecond line")
def odd(): return {"name": "odd"}
def renamed(): return EncoderCard("another", "test_vit", 64)
"""
POINTS = {
    "toy": "my_encoders:toy",
    "mean": "my_encoders:mean",
    "fails": "my_encoders:fails",
    "odd": "my_encoders:odd",
    "renamed": "my_encoders:renamed",
    "absent": "no_such_module:encoder",
    "uni": "my_encoders:toy",
}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of installed packages."""
    site = tmp_path / "site"
    info = site / "my_encoders-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "my_encoders.py").write_text(MODULE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-encoders\nVersion: 1.0\n")
    (info / "INSTALLER").write_text("pip\n")
    (info / "RECORD").write_text("my_encoders.py,,\n")
    lines = [f"{name} = {target}" for name, target in POINTS.items()]
    (info / "entry_points.txt").write_text("\n".join(["[hmil_fast.encoders]", *lines]))
    return site


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(site)


@pytest.mark.usefixtures("installed")
def test_a_card_of_a_plugin(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    encoder = load_encoder("toy", tmp_path / "w.safetensors", CPU)
    tiles = torch.rand(2, 3, 160, 160)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(tiles), model(tiles))
    assert encoder.describe()["name"] == "toy"
    with pytest.raises(UsageError, match="the weights of encoder 'toy' are not on the hub"):
        load_encoder("toy", None, CPU)


@pytest.mark.usefixtures("installed")
def test_a_model_of_a_plugin(tmp_path: Path) -> None:
    tiles = torch.rand(20, 3, 32, 32)
    encoder = load_encoder("mean", None, CPU)
    torch.testing.assert_close(encoder(tiles), tiles.mean((2, 3)))
    assert encoder.limit == 5
    save_file({"weight": 2 * torch.eye(3)}, tmp_path / "w.safetensors")
    other = load_encoder("mean", tmp_path / "w.safetensors", CPU)
    torch.testing.assert_close(other(tiles), 2 * tiles.mean((2, 3)))
    assert other.weights_sha256 != encoder.weights_sha256
    save_file({"weights": torch.eye(3)}, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=r"missing \['weight'\], 1 are unexpected \['weights'\]"):
        load_encoder("mean", tmp_path / "w.safetensors", CPU)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("fails", "is broken: RuntimeError: no licence found"),
        ("odd", "returns dict, not an EncoderCard"),
        ("renamed", "returns a card named 'another'"),
        ("absent", "is broken: ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_a_broken_plugin_is_named(name: str, problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_encoder(name, None, CPU)
    plugin = f"encoder plugin {name!r} of my-encoders ({POINTS[name]}) "
    assert caught.value.what == plugin + problem + (
        " or (EncoderCard, module)" if name == "odd" else ""
    )
    assert caught.value.fix == "upgrade my-encoders, or pip uninstall my-encoders"


@pytest.mark.usefixtures("installed")
def test_broken_plugins_take_down_nothing_else() -> None:
    cards, broken = plugins()
    assert [card.name for card in cards] == ["mean", "toy"]
    assert len(broken) == 5
    assert any("'uni' of my-encoders" in error.what for error in broken)
    assert find_card("uni").hub == "MahmoodLab/UNI"  # ours is not replaced
    with pytest.raises(UsageError, match="no encoder is called 'x'") as caught:
        find_card("x")
    assert ", toy, " in caught.value.fix


@pytest.mark.slow
def test_the_commands_know_plugins(
    site: Path, tmp_path: Path, cli_process: Callable[..., object], slide_file: SlideFile
) -> None:
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    said = cli_process("doctor", "--json", PYTHONPATH=path)
    findings = json.loads(said.stdout)["machine"]  # type: ignore[attr-defined]
    whats = [finding["what"] for finding in findings]
    assert "encoders of plugins: mean, toy" in whats
    broken = [f for f in findings if f["what"].startswith("encoder plugin ")]
    assert len(broken) == 5
    assert {f["state"] for f in broken} == {"note"}
    slide = slide_file("cmu1_small_pyramid.tif")
    done = cli_process(
        "extract", slide, "--store", tmp_path / "store", "--encoder", "mean", "--mpp", "1",
        "--batch-size", "16", "--precision", "bf16",
        PYTHONPATH=path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr  # type: ignore[attr-defined]
    assert "encoder mean goes on with 8" in done.stderr  # type: ignore[attr-defined]
    store = open_store(tmp_path / "store")
    attrs = store.record(slide.stem).attrs
    assert (attrs["batch"], attrs["compiled"], attrs["precision"]) == (16, False, "bfloat16")
    assert store.features(slide.stem).shape[1] == 3
