"""Precision, compilation, and batches that shrink until memory suffices."""

import logging
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from hmil_fast.errors import UsageError
from hmil_fast.extraction.encoders import Encoder, EncoderCard, find_card

CPU = torch.device("cpu")
SMALL = "test_vit"


class Hungry(nn.Module):
    """Runs out of memory above some tiles, as a GPU does; a real module of some plugin."""

    def __init__(self, most: int, error: type[Exception] = torch.OutOfMemoryError) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(12.0).view(4, 3))
        self.most, self.error = most, error
        self.sizes: list[int] = []

    def forward(self, tiles: Tensor) -> Tensor:
        self.sizes.append(len(tiles))
        if len(tiles) > self.most:
            raise self.error("CUDA out of memory. Tried to allocate 20.00 GiB")
        return tiles.mean((2, 3)) @ self.weight.T


def hungry(most: int, error: type[Exception] = torch.OutOfMemoryError) -> tuple[Encoder, Hungry]:
    model = Hungry(most, error)
    card = EncoderCard("hungry", "hungry", 4, resize_px=8, input_px=8)
    return Encoder(card, model, CPU), model


@pytest.fixture
def small() -> Encoder:
    torch.manual_seed(0)
    return Encoder(find_card(SMALL), timm.create_model(SMALL, num_classes=0), CPU)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_a_batch_that_does_not_fit_runs_again_in_halves(
    error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    encoder, model = hungry(5, error)
    tiles = torch.rand(32, 3, 8, 8)
    with caplog.at_level(logging.WARNING, "hmil_fast"):
        features = encoder(tiles)
    torch.testing.assert_close(features, tiles.mean((2, 3)) @ model.weight.detach().T)
    assert model.sizes == [32, 16, 8, *[4] * 8]
    assert encoder.limit == 4
    assert "out of memory with 8 tiles at once: encoder hungry goes on with 4" in caplog.messages
    model.sizes.clear()
    encoder(tiles)
    assert model.sizes == [4] * 8  # remembered


def test_a_single_tile_that_does_not_fit_is_an_error() -> None:
    encoder, model = hungry(0)
    with pytest.raises(torch.OutOfMemoryError):
        encoder(torch.rand(4, 3, 8, 8))
    assert model.sizes == [4, 2, 1]
    with pytest.raises(UsageError, match=r"cpu has not enough memory for a tile of .*hungry"):
        encoder.prepare()


def test_other_errors_are_no_reason_for_halves() -> None:
    encoder, model = hungry(1, RuntimeError)
    with pytest.raises(RuntimeError):
        encoder(torch.rand(2, 3, 8, 8))
    assert model.sizes == [2]


def test_the_batch_is_chosen_by_the_memory(small: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert small.prepare(17) == 17  # as asked
    assert small.prepare() == 16  # a toy fits into any machine
    need = small._tile_bytes()
    tokens = 101 * 4 * (64 + 192)  # attention's projection of one tile: 100 tokens and the class
    assert 2 * tokens <= need <= 10 * tokens
    import hmil_fast.extraction.encoders.encoder as module

    for fitting in (1, 3, 40):
        monkeypatch.setattr(module, "free_memory", lambda device, n=fitting: 4 * n * need + 99)
        assert small.prepare() == {1: 1, 3: 2, 40: 16}[fitting]
    monkeypatch.setattr(module, "free_memory", lambda device: 0)
    assert small.prepare() == 1


def test_a_model_that_gives_another_vector_than_its_card() -> None:
    card = EncoderCard("hungry", "hungry", 5, resize_px=8, input_px=8)
    with pytest.raises(UsageError, match=r"gives \(1, 4\) for 1 tiles, its card says 5 a tile"):
        Encoder(card, Hungry(9), CPU).prepare()


@pytest.mark.parametrize(("name", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_halved_precision_is_near(small: Encoder, name: str, dtype: str) -> None:
    half = Encoder(small.card, deepcopy(small.model), CPU, name)
    assert (half.precision, small.precision) == (dtype, "float32")
    assert half.weights_sha256 == small.weights_sha256
    tiles = torch.rand(2, 3, 160, 160)
    near, exact = half(tiles), small(tiles)
    assert near.dtype == torch.float32
    assert not torch.equal(near, exact)
    torch.testing.assert_close(near, exact, rtol=0.05, atol=0.05)


# plain, with standardised weights (a subclass of Conv2d), attention, and depth-wise convolutions
@pytest.mark.parametrize(
    "name", ["resnet18", "resnetv2_50", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224",
             "tf_efficientnet_lite0"],
)  # fmt: skip
def test_weights_cast_once_give_the_same_bits(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0)
    card = EncoderCard(name, name, model.num_features, resize_px=224, input_px=224)
    once, each_time = (
        Encoder(card, deepcopy(model), CPU, "bf16", cast_once=cast) for cast in (True, False)
    )
    tiles = torch.randn(2, 3, 224, 224)
    assert torch.equal(once(tiles), each_time(tiles))
    assert once.weights_sha256 == each_time.weights_sha256
    dtypes = {type(m): m.weight.dtype for m in once.model.modules() if hasattr(m, "weight")}
    assert torch.bfloat16 in (dtypes.get(nn.Linear), dtypes.get(nn.Conv2d))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a compiler it says so before any slide; with one the vectors are the same."""
    import torch._inductor.config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    card = EncoderCard("small", "small", 12, resize_px=8, input_px=8)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 12), nn.Softmax(1))
    # for one small kernel they take four times as long as it
    monkeypatch.setattr(inductor, "cpp_cache_precompile_headers", False)
    monkeypatch.setattr(inductor.cpp, "vec_isa_ok", True)
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        with pytest.raises(UsageError, match="'small' cannot be compiled here") as caught:
            Encoder(card, model, CPU, compiled=True).prepare(2)
        assert "leave out --compile" in caught.value.fix
    torch._dynamo.reset()
    quick, plain = Encoder(card, model, CPU, compiled=True), Encoder(card, model, CPU)
    assert quick.prepare(4) == 4
    tiles = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(quick(tiles), plain(tiles))
    assert list(tmp_path.rglob("*.so"))  # it was compiled
