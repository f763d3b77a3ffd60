"""Map state-dict keys from other libraries to timm's."""

import math
import re

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

# pattern and replacement, applied in this order to every key
RENAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "transformers": (  # ViTModel, Dinov2Model, Dinov2WithRegistersModel
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.register_tokens$", "reg_token"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.", ""),
        (r"^encoder\.layer\.", "blocks."),
        (r"\.attention\.attention\.", ".attn."),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"\.mlp\.weights_in\.", ".mlp.fc1."),
        (r"\.mlp\.weights_out\.", ".mlp.fc2."),
        (r"^layernorm\.", "norm."),
    ),
    "dinov2": (  # facebookresearch/dinov2
        (r"^register_tokens$", "reg_token"),
        (r"\.mlp\.w12\.", ".mlp.fc1."),
        (r"\.mlp\.w3\.", ".mlp.fc2."),
    ),
    "swin": tuple(  # Swin's authors: a stage begins with what ended the one before
        (rf"^layers\.{i}\.downsample\.", f"layers.{i + 1}.downsample.") for i in (2, 1, 0)
    ),
    "timm": (),
}

# of training only, or computed from the shape
_UNUSED = re.compile(r"^(mask_token|pooler\..*)$|relative_position_index$|attn_mask$")


def naming(state: dict[str, Tensor]) -> str:
    """Whose names a state dict has: a key of `RENAMES`."""
    if "embeddings.cls_token" in state:
        return "transformers"
    if "register_tokens" in state or any(".mlp.w12." in key for key in state):
        return "dinov2"
    return "swin" if "layers.0.downsample.reduction.weight" in state else "timm"


def to_timm(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict in timm's names, its positions for the model's grid.

    Args:
        state: As its authors publish it.
        model: The one that it is for.
    """
    source = naming(state)
    renamed = {}
    for name, value in state.items():
        key = name
        for pattern, replacement in RENAMES[source]:
            key = re.sub(pattern, replacement, key)
        if not _UNUSED.search(key):
            renamed[key] = value
    for key in [key for key in renamed if ".attn.query." in key]:
        parts = [key.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in renamed for part in parts):
            merged = torch.cat([renamed.pop(part) for part in parts])
            renamed[key.replace(".query.", ".qkv.")] = merged
    wanted = model.state_dict()
    if "trunk.pos_embed" in renamed and "trunk.pos_embed" in wanted:
        renamed["trunk.pos_embed"] = _conch_positions(renamed["trunk.pos_embed"])
    if "pos_embed" in renamed and "pos_embed" in wanted:
        _fit_positions(renamed, wanted["pos_embed"].shape[1], antialias=source != "transformers")
    return renamed


def _fit_positions(state: dict[str, Tensor], length: int, *, antialias: bool) -> None:
    """Bring positions to the model's grid as the naming's own library does at run time.

    Where the model adds no position to the class token, the one it had goes into the token.
    """
    positions = state["pos_embed"]
    had_class, has_class = _is_square(positions.shape[1] - 1), _is_square(length - 1)
    first, grid = positions[:, : int(had_class)], positions[:, int(had_class) :]
    if had_class and not has_class and "cls_token" in state:
        state["cls_token"] = state["cls_token"] + first
        first = first[:, :0]
    edge = math.isqrt(length - int(has_class))
    if edge**2 != grid.shape[1] and _is_square(grid.shape[1]):
        grid = _tokens(
            interpolate(
                _map(grid), (edge, edge), mode="bicubic", align_corners=False, antialias=antialias
            )
        )
    state["pos_embed"] = torch.cat([first, grid], dim=1)


def _conch_positions(positions: Tensor) -> Tensor:
    """Positions of 448-px tiles as CONCH v1.5 makes them: by way of the 14 × 14 of 224-px tiles."""
    first, grid = positions[:, :1], positions[:, 1:]
    if not _is_square(grid.shape[1]):
        return positions
    if grid.shape[1] != 14**2:
        grid = _tokens(interpolate(_map(grid), (14, 14), mode="bilinear"))
    # by DINO's factor of a tenth of a token more, which shifts the grid a little
    factor = (28 + 0.1) / 14
    grid = _tokens(interpolate(_map(grid), scale_factor=(factor, factor), mode="bicubic"))
    return torch.cat([first, grid], dim=1)


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


def _map(tokens: Tensor) -> Tensor:
    """Tokens [1, n, d] as a map [1, d, √n, √n] in float32."""
    edge = math.isqrt(tokens.shape[1])
    return tokens.float().transpose(1, 2).reshape(1, -1, edge, edge)


def _tokens(grid: Tensor) -> Tensor:
    return grid.flatten(2).transpose(1, 2)
