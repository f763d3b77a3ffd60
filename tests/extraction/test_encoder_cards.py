"""Every card keeps the vector that it had, and weights named by others give the others' vector.

Run as a script, this file writes its golden numbers anew; that needs the package transformers,
whose models are where the numbers of "foreign" come from.
"""

import json
import re
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hmil_fast.extraction.encoders import CARDS, Encoder, EncoderCard, find_card, load_encoder
from hmil_fast.extraction.encoders.architectures import build_empty, build_model
from hmil_fast.extraction.encoders.keys import to_timm
from hmil_fast.extraction.encoders.weights import fit
from hmil_fast.io.tiles.transform import build_transform

CPU = torch.device("cpu")
FILE = Path(__file__).with_name("encoder_goldens.json")
GOLDEN: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
# of the same model as another, see test_variants
VARIANTS = [card.name for card in CARDS if card.name.endswith("-cls")] + ["h-optimus-1"]
DISTINCT = [card for card in CARDS if card.name not in VARIANTS]
FULL = ("resnet", "efficientnet", "swin")  # small enough; the others are cut to their first block


def noise(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The same numbers in [-1, 1) on every machine, others for every name."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return rng.random(shape, np.float32) * 2 - 1


def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """A weight of a size that lets signals through; vectors of the wrong place would be seen."""
    value = torch.from_numpy(np.asarray(noise(name, shape)))
    if len(shape) == 3 and shape[0] == 1:  # tokens and positions
        return value
    if len(shape) > 1:
        return value * (3 / max(1, np.prod(shape[1:]))) ** 0.5
    plain = name.endswith(("bias", "running_mean"))
    return 0.2 * value if plain else 1 + 0.2 * value


def filled(card: EncoderCard) -> nn.Module:
    """The card's model with weights by their names."""
    model = build_empty(short(card))
    state = {k: tensor(k, tuple(v.shape)) for k, v in model.state_dict().items()}
    fit(model, state, "a formula", card.name)
    return model


def short(card: EncoderCard) -> EncoderCard:
    if any(part in card.arch for part in FULL):
        return card
    return replace(card, options={**card.options, "depth": 1})


def tiles(card: EncoderCard) -> Tensor:
    """One tile of coarse noise through the card's own preprocessing, from pixels."""
    coarse = (noise("tile", (1, 16, 16, 3)) * 127 + 128).astype(np.uint8)
    pixels = np.ascontiguousarray(coarse.repeat(16, axis=1).repeat(16, axis=2))
    transform = build_transform(
        read_px=256,
        input_px=card.resize_px,
        mean=card.mean,
        std=card.std,
        interpolation=card.interpolation,
        batch=1,
        device=CPU,
        backend="torch",
    )
    return transform(pixels)


def numbers(features: Tensor) -> list[float]:
    """A few numbers of [1, dim] that tell one vector from another: parts of it, and its size."""
    picked = features[0, :: max(1, features.shape[1] // 6)][:6]
    return [round(x, 4) for x in [*picked.tolist(), features.abs().mean().item()]]


def described(card: EncoderCard) -> dict[str, Any]:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_model(card).parameters())
    model = filled(card)
    features = Encoder(card, model, CPU)(tiles(card))
    return {"parameters": parameters, "dim": features.shape[1], "features": numbers(features)}


@pytest.mark.slow
@pytest.mark.parametrize("card", DISTINCT, ids=lambda card: card.name)
def test_a_card_keeps_its_vector(card: EncoderCard) -> None:
    golden = GOLDEN["cards"][card.name]
    now = described(card)
    assert now["parameters"] == golden["parameters"]
    assert now["dim"] == golden["dim"] == card.dim
    assert now["features"] == pytest.approx(golden["features"], rel=2e-3, abs=2e-3)


def test_cards_are_told_apart() -> None:
    assert len({card.name for card in CARDS}) == len(CARDS)
    assert set(GOLDEN["cards"]) == {card.name for card in DISTINCT}
    # but for uni and phikon-v2, both a ViT-L/16 with layer scale, ImageNet's colours and bilinear
    vectors = {str(golden["features"]) for golden in GOLDEN["cards"].values()}
    assert len(vectors) == len(DISTINCT) - 1


def test_the_table_in_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "encoders.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    table = {row[0].strip("| `"): row[1:] for row in rows if len(row) == 7 and row[1].isdigit()}
    assert set(table) == {card.name for card in CARDS}
    for card in CARDS:
        dim, _, size, _, hub, licence = table[card.name]
        assert int(dim) == card.dim
        assert size.startswith(str(card.resize_px))
        assert card.hub is None or card.hub == hub
        assert licence.removesuffix(" |") == card.licence


def test_variants() -> None:
    first, second = find_card("h-optimus-0"), find_card("h-optimus-1")
    assert first == replace(second, name=first.name, hub=first.hub, licence=first.licence)
    for name in VARIANTS[:-1]:
        alone, both = find_card(name), find_card(name.removesuffix("-cls"))
        assert both == replace(alone, name=both.name, pooling="cls+mean", dim=2 * alone.dim)
    card = find_card("h0-mini")
    model, x = filled(card), tiles(card)
    both = Encoder(card, model, CPU)(x)
    alone = Encoder(find_card("h0-mini-cls"), model, CPU)(x)
    assert torch.equal(alone, both[:, :768])
    tokens = model.forward_features(x)
    assert tokens.shape == (1, 1 + 4 + 256, 768)
    torch.testing.assert_close(both[:, 768:], tokens[:, 5:].mean(1))


@pytest.mark.parametrize("name", ["phikon", "phikon-v2", "hibou-b", "hibou-l", "midnight-12k",
                                  "ctranspath"])  # fmt: skip
def test_weights_in_the_names_of_their_authors(name: str) -> None:
    golden = GOLDEN["foreign"][name]
    card = find_card(name)
    model = build_empty(short(card))
    state = {key: tensor(key, tuple(shape)) for key, shape in golden["tensors"].items()}
    fit(model, to_timm(state, model), golden["source"], name)
    features = Encoder(card, model, CPU)(tiles(card))
    assert numbers(features) == pytest.approx(golden["features"], rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("name", ["kaiko-s16", "ctranspath"])
def test_a_whole_encoder_from_a_file(name: str, tmp_path: Path) -> None:
    """With and without buffers that no file holds; half precision in a file is widened."""
    card = find_card(name)
    torch.manual_seed(0)
    plain = build_model(card)
    state = {k: v.half() if v.is_floating_point() else v for k, v in plain.state_dict().items()}
    plain.load_state_dict(state)
    torch.save(state, tmp_path / "half.pth")
    encoder = load_encoder(name, tmp_path / "half.pth", CPU)
    assert {p.dtype for p in encoder.model.parameters()} == {torch.float32}
    other = Encoder(card, plain, CPU)
    assert encoder.weights_sha256 == other.weights_sha256
    x = tiles(card)
    assert torch.equal(encoder(x), other(x))


def test_names_of_dinov2s_own_code() -> None:
    """As hibou-b.pth: facebookresearch/dinov2 with registers, positions for the class token too."""
    card = find_card("hibou-b")
    golden = GOLDEN["foreign"]["hibou-b"]
    published = {key: tensor(key, tuple(shape)) for key, shape in golden["tensors"].items()}
    model = build_empty(short(card))
    state = to_timm(published, model)
    state["register_tokens"] = state.pop("reg_token")
    for old, new in (("fc1", "w12"), ("fc2", "w3")):
        for part in ("weight", "bias"):
            state[f"blocks.0.mlp.{new}.{part}"] = state.pop(f"blocks.0.mlp.{old}.{part}")
    state["cls_token"] = published["embeddings.cls_token"]
    state["pos_embed"] = published["embeddings.position_embeddings"]
    state["mask_token"] = torch.zeros(1, 768)
    fit(model, to_timm(state, model), "hibou-b.pth", card.name)
    features = Encoder(card, model, CPU)(tiles(card))
    assert numbers(features) == pytest.approx(golden["features"], rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("edge", [14, 28])
def test_conch_by_its_formulas(edge: int) -> None:
    card = find_card("conch-v1.5")
    model: Any = filled(card)
    state = dict(model.state_dict())
    state["trunk.pos_embed"] = positions = tensor("positions", (1, edge**2 + 1, 1024))
    fit(model, to_timm(state, model), "conch", card.name)
    x = tiles(card)
    features = Encoder(card, model, CPU)(x)
    with torch.inference_mode():
        grid = positions[:, 1:].transpose(1, 2).reshape(1, 1024, edge, edge)
        if edge == 28:  # the bilinear half of an even grid is the mean of every 2 × 2
            grid = grid.reshape(1, 1024, 14, 2, 14, 2).mean((3, 5))
        factor = 28.1 / 14
        grid = nn.functional.interpolate(grid, scale_factor=factor, mode="bicubic")
        added = torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
        torch.testing.assert_close(model.trunk.pos_embed, added)
        tokens = model.trunk.forward_features(x)
        pool, norm = model.attn_pool_contrast, nn.functional.layer_norm
        query = norm(pool.query, (768,), pool.ln_q.weight, pool.ln_q.bias) @ pool.to_q.weight.T
        context = norm(tokens, (1024,), pool.ln_k.weight, pool.ln_k.bias)
        keys, values = (context @ pool.to_kv.weight.T).split(768, dim=-1)
        heads = []
        for head in range(8):
            of = slice(96 * head, 96 * head + 96)
            weights = (keys[..., of] @ query[0, of] / 96**0.5).softmax(1)
            heads.append(weights @ values[0, :, of])
        pooled = torch.cat(heads, dim=1) @ pool.to_out.weight.T
        expected = norm(pooled, (768,), model.ln_contrast.weight, model.ln_contrast.bias)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


def foreign() -> dict[str, Any]:
    """Features of the authors' own architectures, as transformers has them, cut to one block."""
    import tempfile

    import transformers as hf
    from safetensors.torch import load_file

    dino = {"patch_size": 14, "image_size": 224, "layer_norm_eps": 1e-6}
    gated = {**dino, "use_swiglu_ffn": True}
    base = {"hidden_size": 768, "num_attention_heads": 12}
    large = {"hidden_size": 1024, "num_attention_heads": 16}
    giant = {"hidden_size": 1536, "num_attention_heads": 24, **gated, "image_size": 518}
    registers = hf.Dinov2WithRegistersConfig, hf.Dinov2WithRegistersModel
    made: dict[str, Any] = {}
    for name, (config, kind), options in (
        ("phikon", (hf.ViTConfig, hf.ViTModel), {}),
        ("phikon-v2", (hf.Dinov2Config, hf.Dinov2Model), {**dino, **large, "patch_size": 16}),
        ("hibou-b", registers, {**gated, **base}),
        ("hibou-l", registers, {**gated, **large}),
        ("midnight-12k", (hf.Dinov2Config, hf.Dinov2Model), giant),
    ):
        model = kind(config(num_hidden_layers=1, **options)).eval()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            shapes = {
                k: tuple(v.shape) for k, v in load_file(f"{folder}/model.safetensors").items()
            }
            from safetensors.torch import save_file

            state = {key: tensor(key, shape) for key, shape in shapes.items()}
            save_file(state, f"{folder}/model.safetensors", {"format": "pt"})
            model = kind.from_pretrained(folder).eval()
        with torch.inference_mode():
            tokens = model(tiles(find_card(name))).last_hidden_state
        features = tokens[:, 0]
        if name == "midnight-12k":
            features = torch.cat([features, tokens[:, 1:].mean(1)], dim=1)
        made[name] = golden(f"transformers {hf.__version__} {kind.__name__}", shapes, features)
    made["ctranspath"] = swin(hf)
    return made


def golden(source: str, shapes: dict[str, tuple[int, ...]], features: Tensor) -> dict[str, Any]:
    return {"source": source, "tensors": shapes, "features": numbers(features)}


def swin(hf: Any) -> dict[str, Any]:
    """CTransPath: the Swin-T of transformers behind the stem's formula; Swin's authors' names."""
    model = hf.SwinModel(hf.SwinConfig()).eval()
    theirs = model.state_dict()
    state: dict[str, Tensor] = {}
    names = {key: swin_name(key) for key in theirs if "patch_embeddings" not in key}
    for key, name in names.items():
        value = theirs[key]
        if ".qkv." in name:
            value = value.repeat(3, *[1] * (value.ndim - 1))
        state[name] = tensor(name, tuple(value.shape))
    stem: dict[str, Tensor] = {}
    for i, (wide, narrow, px) in {0: (12, 3, 3), 3: (24, 12, 3), 6: (96, 24, 1)}.items():
        shapes = {f"{i}.weight": (wide, narrow, px, px)}
        if i == 6:
            shapes["6.bias"] = (96,)
        else:
            for part in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"{i + 1}.{part}"] = (wide,)
        stem |= {key: tensor(f"patch_embed.proj.{key}", shape) for key, shape in shapes.items()}
    state |= {f"patch_embed.proj.{key}": value for key, value in stem.items()}

    def first_layer(pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = pixels
        for i in (0, 3):
            x = nn.functional.conv2d(x, stem[f"{i}.weight"], stride=2, padding=1)
            norm = [stem[f"{i + 1}.{k}"].view(-1, 1, 1)
                    for k in ("running_mean", "running_var", "weight", "bias")]  # fmt: skip
            x = ((x - norm[0]) / (norm[1] + 1e-5).sqrt() * norm[2] + norm[3]).relu()
        x = nn.functional.conv2d(x, stem["6.weight"], stem["6.bias"])
        return x.flatten(2).transpose(1, 2), (56, 56)

    loaded = dict(theirs)
    for key, name in names.items():
        part = {"q_proj": 0, "k_proj": 1, "v_proj": 2}.get(key.split(".")[-2])
        loaded[key] = state[name] if part is None else state[name].chunk(3)[part]
    model.load_state_dict(loaded)
    model.embeddings.patch_embeddings.forward = first_layer
    with torch.inference_mode():
        features = model(tiles(find_card("ctranspath"))).pooler_output
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    shapes["layers.0.blocks.0.attn.relative_position_index"] = (49, 49)
    shapes["layers.0.blocks.1.attn_mask"] = (64, 49, 49)
    for i in (1, 4):
        shapes[f"patch_embed.proj.{i}.num_batches_tracked"] = ()
    return golden(f"transformers {hf.__version__} SwinModel", shapes, features)


def swin_name(key: str) -> str:
    """A key of transformers' Swin as Swin's authors have it."""
    key = key.removeprefix("encoder.").replace("embeddings.norm", "patch_embed.norm")
    for old, new in SWIN_NAMES.items():
        key = key.replace(old, new)
    return key


SWIN_NAMES = {
    "attention.q_proj": "attn.qkv",
    "attention.k_proj": "attn.qkv",
    "attention.v_proj": "attn.qkv",
    "attention.o_proj": "attn.proj",
    "attention.relative_position_bias.": "attn.",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "layernorm": "norm",
}


if __name__ == "__main__":
    cards = {card.name: described(card) for card in DISTINCT}
    text = json.dumps({"cards": cards, "foreign": foreign()}, indent=1)
    flat = re.sub(r"\[[^\[\]]*\]", lambda found: " ".join(found[0].split()), text)
    FILE.write_text(flat + "\n")
