"""The table of encoders: to add one, add a card. This module imports neither torch nor timm.

The same name is not the same vector across tools, so a card says all that decides the vector:
architecture, pooling, resize, crop, mean and std. The card and a hash of the weights go into the
store. Facts are those of the authors' model cards and configs; where an author's card states no
resize, it is torchvision's default (bilinear, to the input's edge).
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
LITE = ((127 / 255,) * 3, (128 / 255,) * 3)  # (RGB - 127) / 128
H_OPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
HIBOU = ((0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816))
LUNIT = ((0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464))

_NOT_OF_THE_VECTOR = ("files", "licence")


@dataclass(frozen=True)
class EncoderCard:
    """What decides an encoder's vector, and where its weights are.

    Attributes:
        name: The name on the command line.
        arch: timm architecture, or one of `architectures.OWN`.
        dim: Length of the feature vector.
        hub: Repository on the Hugging Face hub, or None.
        pooling: "model" (the model's own output), "cls" (class token), "cls+mean" (class token and
            mean of the tile tokens, concatenated) or "stage3" (mean of the third stage's map).
        resize_px: The tile is resized to this edge, then cropped to `input_px` at its centre.
        input_px: Edge of the encoder's input.
        mean: Per channel, of RGB in 0–1.
        std: Per channel, of RGB in 0–1.
        interpolation: "bilinear" or "bicubic", for the resize.
        mpp: Resolutions (µm/px) that the encoder was made for; empty where none is stated.
        options: Keywords for the architecture; layers by their names.
        files: Names under which the hub may have the weights, the best first.
        licence: Of the weights; "gated" where the hub asks to accept it.
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
    files: tuple[str, ...] = ("model.safetensors", "pytorch_model.bin")
    licence: str = ""

    def to_dict(self) -> dict[str, Any]:
        """What decides the vector, as JSON."""
        card = {k: v for k, v in asdict(self).items() if k not in _NOT_OF_THE_VECTOR}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in card.items()}


DEFAULT_ENCODER = "efficientnet-lite0"

_SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"}
_VIRCHOW = {"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.3375, "global_pool": "", **_SWIGLU}
_OPTIMUS = {"img_size": 224, "init_values": 1e-5, "dynamic_img_size": False}
# mlp_ratio counts both halves of a gated layer: hidden 2048 of 768, 2736 of 1024
_BASE_SWIGLU = {"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.33334, **_SWIGLU}
_LARGE_SWIGLU = {"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.34375, **_SWIGLU}
_REG4 = "patch14_reg4_dinov2"
_KAIKO = "kaiko_ai_towards_large_pathology_fms"
_NC = "CC-BY-NC-ND-4.0, gated"


def _kaiko(size: str, dim: int, arch: str, hub: str, **options: Any) -> EncoderCard:
    """Kaiko's five, alike but for their size."""
    return EncoderCard(
        f"kaiko-{size}", arch, dim, f"1aurent/{hub}.{_KAIKO}", mean=HALF[0], std=HALF[1],
        options=options, licence="kaiko-non-commercial",
    )  # fmt: skip


def _with_cls(card: EncoderCard) -> list[EncoderCard]:
    """The card, and the one that keeps the class token alone, as other tools do."""
    return [card, replace(card, name=f"{card.name}-cls", pooling="cls", dim=card.dim // 2)]


CARDS = [
    EncoderCard(
        "efficientnet-lite0", "tf_efficientnet_lite0", 1280, mean=LITE[0], std=LITE[1],
        licence="Apache-2.0",
    ),
    EncoderCard(
        "resnet50", "resnet50.tv_in1k", 2048, "timm/resnet50.tv_in1k", licence="BSD-3-Clause",
    ),
    EncoderCard(
        "resnet50-clam", "resnet50.tv_in1k", 1024, "timm/resnet50.tv_in1k", "stage3",
        licence="BSD-3-Clause",
    ),
    EncoderCard(
        "uni", "vit_large_patch16_224", 1024, "MahmoodLab/UNI", mpp=(0.5,),
        options={"init_values": 1e-5, "dynamic_img_size": True}, licence=_NC,
    ),
    EncoderCard(
        "uni2-h", "vit_giant_patch14_224", 1536, "MahmoodLab/UNI2-h", mpp=(0.5,),
        options={
            "img_size": 224, "depth": 24, "num_heads": 24, "init_values": 1e-5, "embed_dim": 1536,
            "mlp_ratio": 2.66667 * 2, "no_embed_class": True, "reg_tokens": 8,
            "dynamic_img_size": True, **_SWIGLU,
        },
        licence=_NC,
    ),
    EncoderCard(
        "conch-v1.5", "conch_v1_5", 768, "MahmoodLab/conchv1_5", resize_px=448, input_px=448,
        mpp=(0.5,), files=("pytorch_model_vision.bin",), licence=_NC,
    ),
    *_with_cls(EncoderCard(
        "virchow", "vit_huge_patch14_224", 2560, "paige-ai/Virchow", "cls+mean",
        interpolation="bicubic", mpp=(0.5,), options=_VIRCHOW, licence="Apache-2.0, gated",
    )),
    *_with_cls(EncoderCard(
        "virchow2", "vit_huge_patch14_224", 2560, "paige-ai/Virchow2", "cls+mean",
        interpolation="bicubic", mpp=(0.25, 0.5, 1.0, 2.0), options={**_VIRCHOW, "reg_tokens": 4},
        licence=_NC,
    )),
    EncoderCard(
        "prov-gigapath", "vit_giant_patch14_dinov2", 1536, "prov-gigapath/prov-gigapath",
        resize_px=256, interpolation="bicubic", mpp=(0.5,),
        options={
            "img_size": 224, "patch_size": 16, "in_chans": 3, "embed_dim": 1536, "depth": 40,
            "num_heads": 24, "init_values": 1e-5, "mlp_ratio": 5.33334, "global_pool": "token",
        },
        licence="Apache-2.0 with conditions, gated",
    ),
    EncoderCard(
        "h-optimus-0", f"vit_giant_{_REG4}", 1536, "bioptimus/H-optimus-0",
        mean=H_OPTIMUS[0], std=H_OPTIMUS[1], mpp=(0.5,), options=_OPTIMUS,
        licence="Apache-2.0, gated",
    ),
    EncoderCard(
        "h-optimus-1", f"vit_giant_{_REG4}", 1536, "bioptimus/H-optimus-1",
        mean=H_OPTIMUS[0], std=H_OPTIMUS[1], mpp=(0.5,), options=_OPTIMUS, licence=_NC,
    ),
    *_with_cls(EncoderCard(
        "h0-mini", f"vit_base_{_REG4}", 1536, "bioptimus/H0-mini", "cls+mean",
        mean=H_OPTIMUS[0], std=H_OPTIMUS[1], interpolation="bicubic", mpp=(0.5,),
        options=_BASE_SWIGLU, licence=_NC,
    )),
    EncoderCard(
        "hibou-b", f"vit_base_{_REG4}", 768, "histai/hibou-b", mean=HIBOU[0], std=HIBOU[1],
        interpolation="bicubic", mpp=(0.5,), options=_BASE_SWIGLU, licence="Apache-2.0",
    ),
    EncoderCard(
        "hibou-l", f"vit_large_{_REG4}", 1024, "histai/hibou-L", mean=HIBOU[0], std=HIBOU[1],
        interpolation="bicubic", mpp=(0.5,), options=_LARGE_SWIGLU, licence="Apache-2.0, gated",
    ),
    EncoderCard(
        "phikon", "vit_base_patch16_224", 768, "owkin/phikon", mpp=(0.5,),
        options={"norm_eps": 1e-12}, licence="Owkin non-commercial",
    ),
    EncoderCard(
        "phikon-v2", "vit_large_patch14_dinov2", 1024, "owkin/phikon-v2", mpp=(0.5,),
        options={"img_size": 224, "patch_size": 16}, licence="Owkin non-commercial",
    ),
    EncoderCard(
        "ctranspath", "swin_tiny_conv_stem", 768, mpp=(1.0,),
        licence="GPL-3.0 (github.com/Xiyue-Wang/TransPath)",
    ),
    *_with_cls(EncoderCard(
        "midnight-12k", "vit_giant_patch14_dinov2", 3072, "kaiko-ai/midnight", "cls+mean",
        mean=HALF[0], std=HALF[1], mpp=(0.25, 0.5, 1.0, 2.0), options={"img_size": 224},
        licence="MIT",
    )),
    EncoderCard(
        "lunit-dino-s8", "vit_small_patch8_224", 384, "1aurent/vit_small_patch8_224.lunit_dino",
        mean=LUNIT[0], std=LUNIT[1], mpp=(0.5,), licence="Lunit non-commercial",
    ),
    _kaiko("s8", 384, "vit_small_patch8_224", "vit_small_patch8_224", dynamic_img_size=True),
    _kaiko("s16", 384, "vit_small_patch16_224", "vit_small_patch16_224", dynamic_img_size=True),
    _kaiko("b8", 768, "vit_base_patch8_224", "vit_base_patch8_224", dynamic_img_size=True),
    _kaiko("b16", 768, "vit_base_patch16_224", "vit_base_patch16_224", dynamic_img_size=True),
    _kaiko("l14", 1024, f"vit_large_{_REG4}", "vit_large_patch14_reg4_224", img_size=224),
]  # fmt: skip


def encoder_names() -> list[str]:
    """Names of all cards."""
    return [card.name for card in CARDS]
