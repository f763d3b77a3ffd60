"""Build an encoder's model from its card: timm's architectures, and two that timm lacks.

Attributes of the two carry the names of their published state dicts.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from hmil_fast.errors import UsageError
from hmil_fast.extraction.encoders.cards import EncoderCard


def timm_package() -> Any:
    """The timm package.

    Raises:
        UsageError: It cannot be imported, as where torchvision is of another torch.
    """
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # torchvision beside a CPU build of torch
        raise UsageError(
            f"timm cannot be imported ({first_line(error)}; torch is {torch.__version__})",
            "install torch and torchvision of one release: "
            "pip install --force-reinstall torch torchvision",
        ) from None
    return timm


def build_model(card: EncoderCard) -> nn.Module:
    """The model of a card, without its head and with random weights.

    Raises:
        UsageError: timm is broken.
    """
    timm = timm_package()
    layers = {"SwiGLUPacked": timm.layers.SwiGLUPacked, "SiLU": nn.SiLU}
    options = {k: layers.get(v, v) if isinstance(v, str) else v for k, v in card.options.items()}
    eps = options.pop("norm_eps", None)
    create: Callable[..., nn.Module] = OWN.get(card.arch, partial(timm.create_model, card.arch))
    model = create(pretrained=False, num_classes=0, **options)
    if eps is not None:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = eps
    return model


def build_empty(card: EncoderCard) -> nn.Module:
    """The model of a card for `weights.fit` to fill, where possible without values until then.

    Random ones take a ViT-g 23 s of a core and its memory a second time.
    """
    with torch.device("meta"):
        model = build_model(card)
    lasting = model.state_dict().keys()
    if all(name in lasting for name, _ in model.named_buffers()):
        return model
    return build_model(card)  # has buffers that are computed, and that no file holds


class ConvStem(nn.Module):
    """CTransPath's first layer: two strided convolutions, then a projection, for 4 × 4 px a token.

    Wang et al. 2022, doi:10.1016/j.media.2022.102559; the stem is that of Xiao et al. 2021,
    arXiv:2106.14881. Takes what timm's Swin gives to its first layer.
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        embed_dim: int,
        norm_layer: Callable[[int], nn.Module],
        **_: Any,
    ) -> None:
        super().__init__()
        self.grid_size = (img_size[0] // 4, img_size[1] // 4)
        widths = (3, embed_dim // 8, embed_dim // 4)
        layers: list[nn.Module] = []
        for narrow, wide in pairwise(widths):
            convolution = nn.Conv2d(narrow, wide, 3, stride=2, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(wide), nn.ReLU()]
        self.proj = nn.Sequential(*layers, nn.Conv2d(widths[-1], embed_dim, 1))
        self.norm = norm_layer(embed_dim)

    def forward(self, tiles: Tensor) -> Tensor:
        """Tiles [n, 3, px, px] to tokens [n, px / 4, px / 4, embed_dim]."""
        return torch.as_tensor(self.norm(self.proj(tiles).permute(0, 2, 3, 1)))


class _AttentionPool(nn.Module):
    """One learned query attends to all tokens (CoCa's pooler, Yu et al. 2022, arXiv:2205.01917)."""

    def __init__(self, dim: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(1, dim))
        self.ln_q, self.ln_k = nn.LayerNorm(dim), nn.LayerNorm(context)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(context, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        def by_head(x: Tensor) -> Tensor:
            return x.reshape(len(x), -1, self.heads, x.shape[-1] // self.heads).transpose(1, 2)

        query = self.to_q(self.ln_q(self.query)).expand(len(tokens), 1, -1)
        keys, values = self.to_kv(self.ln_k(tokens)).chunk(2, dim=-1)
        pooled = scaled_dot_product_attention(by_head(query), by_head(keys), by_head(values))
        return torch.as_tensor(self.to_out(pooled.flatten(1)))


class ConchVision(nn.Module):
    """Vision tower of CONCH v1.5: ViT-L/16 and an attention pooler (Ding et al. 2024, TITAN)."""

    def __init__(self, pretrained: bool, num_classes: int, **options: Any) -> None:
        super().__init__()
        vit: dict[str, Any] = {"img_size": 448, "init_values": 1.0, **options}
        self.trunk = timm_package().create_model(
            "vit_large_patch16_224", pretrained=pretrained, num_classes=num_classes, **vit
        )
        self.attn_pool_contrast = _AttentionPool(768, 1024, heads=8)
        self.ln_contrast = nn.LayerNorm(768)

    def forward(self, tiles: Tensor) -> Tensor:
        """Tiles [n, 3, 448, 448] to features [n, 768]."""
        tokens = self.trunk.forward_features(tiles)
        return torch.as_tensor(self.ln_contrast(self.attn_pool_contrast(tokens)))


def _swin_tiny_conv_stem(**options: Any) -> nn.Module:
    create: Callable[..., nn.Module] = timm_package().create_model
    return create("swin_tiny_patch4_window7_224", embed_layer=ConvStem, **options)


OWN: dict[str, Callable[..., nn.Module]] = {
    "conch_v1_5": ConchVision,
    "swin_tiny_conv_stem": _swin_tiny_conv_stem,
}


def first_line(error: BaseException) -> str:
    """A foreign library's exception in one line."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
