"""Run a frozen encoder: precision, compilation, and a batch size that fits the memory."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hmil_fast.device import computes_in_bf16, free_memory
from hmil_fast.errors import UsageError
from hmil_fast.extraction.encoders.architectures import first_line
from hmil_fast.extraction.encoders.cards import EncoderCard
from hmil_fast.extraction.encoders.find import find_encoder
from hmil_fast.extraction.encoders.keys import to_timm
from hmil_fast.extraction.encoders.weights import fit, hash_weights, load_weights, read_weights

PRECISIONS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
# tiles a batch: on a CPU 64 take 1.1 to 1.4 times as long a tile as 16, which stay in its caches
_MOST = {"cuda": 256, "cpu": 16}
_SHARE = {"cuda": 0.7, "cpu": 0.25}  # of the free memory, which on a CPU other workers need too
_log = logging.getLogger("hmil_fast")


class Encoder(nn.Module):
    """A frozen encoder: normalised tiles in, one vector a tile out.

    Attributes:
        card: What decides the vector.
        weights_sha256: Hash over all parameters and buffers, independent of the file they came in.
        precision: "bfloat16", "float16" or "float32"; results are float32 anyway.
        limit: Tiles a forward pass at most, once memory was too small for more; else None.
    """

    def __init__(
        self,
        card: EncoderCard,
        model: nn.Module,
        device: torch.device,
        precision: str = "auto",
        compiled: bool = False,
        *,
        cast_once: bool = True,
    ) -> None:
        """Take over a model, which is changed.

        Args:
            card: What decides the vector.
            model: The model.
            device: Where it runs.
            precision: As of `load_encoder`.
            compiled: By torch.compile.
            cast_once: Whether its weights may be cast to half precision for good.
        """
        super().__init__()
        self.card = card
        self.weights_sha256 = hash_weights(model)
        self.device = device
        if precision == "auto":
            # on a CPU in float32: features are made once, and should not tell what made them
            quick = device.type == "cuda" and computes_in_bf16(device)
            precision = "bf16" if quick else "fp32"
        self._dtype = PRECISIONS[precision]
        self.precision = str(self._dtype).removeprefix("torch.")
        self.compiled = compiled
        self.limit: int | None = None
        self.model = model.eval().requires_grad_(requires_grad=False)
        if cast_once and self._dtype != torch.float32:
            _cast_weights(self.model, self._dtype)
        self.model.to(device).to(memory_format=torch.channels_last)
        self._run = torch.compile(self._pool, dynamic=False) if compiled else self._pool

    @torch.inference_mode()
    def forward(self, tiles: Tensor) -> Tensor:
        """Encode tiles [n, 3, resize_px, resize_px], normalised, to features float32 [n, dim].

        Where memory is too small for n, they are encoded in halves, and so from then on.

        Raises:
            torch.OutOfMemoryError: Memory is too small for a single tile.
        """
        card = self.card
        if card.resize_px != card.input_px:
            o = (card.resize_px - card.input_px) // 2
            tiles = tiles[:, :, o : o + card.input_px, o : o + card.input_px]
        done: list[Tensor] = []
        start = 0
        while start < len(tiles):
            size = min(self.limit or len(tiles), len(tiles) - start)
            features = self._try(tiles[start : start + size])
            if features is None:
                self.limit = (size + 1) // 2
                _log.warning(
                    "out of memory with %d tiles at once: encoder %s goes on with %d",
                    size, card.name, self.limit,
                )  # fmt: skip
                continue
            done.append(features)
            start += size
        return done[0] if len(done) == 1 else torch.cat(done)

    def _try(self, tiles: Tensor) -> Tensor | None:
        """Features, or None where there was not enough memory and fewer tiles may do."""
        try:
            tiles = tiles.contiguous(memory_format=torch.channels_last)
            on = self._dtype != torch.float32
            with torch.autocast(self.device.type, self._dtype if on else None, enabled=on):
                return self._run(tiles).float()
        except (torch.OutOfMemoryError, MemoryError):
            if len(tiles) == 1:
                raise
        # outside of `except`, whose traceback holds on to the activations
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _pool(self, tiles: Tensor) -> Tensor:
        model: Any = self.model
        if self.card.pooling in ("cls", "cls+mean"):
            tokens = model.forward_features(tiles)
            if self.card.pooling == "cls":
                return torch.as_tensor(tokens[:, 0])
            mean = tokens[:, model.num_prefix_tokens :].mean(1)
            return torch.cat([tokens[:, 0], mean], dim=1)
        if self.card.pooling == "stage3":
            maps = model.forward_intermediates(
                tiles, indices=[3], stop_early=True, intermediates_only=True
            )
            return torch.as_tensor(maps[-1].mean((2, 3)))
        return torch.as_tensor(model(tiles))

    def prepare(self, batch: int | None = None) -> int:
        """Tiles a batch: as asked, or by the memory of the device.

        What is chosen or compiled is tried at once, before a slide is opened; on a GPU by a whole
        batch, which costs nothing there and warms it.

        Args:
            batch: Tiles; None chooses.

        Raises:
            UsageError: The encoder does not run here, or not as its card says.
        """
        whole = self.compiled or self.device.type == "cuda"
        if batch is not None and not whole:
            return batch
        px = self.card.resize_px
        try:
            size = batch or self._fitting_batch()
            tried = size if whole else 1
            shape = self(torch.zeros(tried, 3, px, px, device=self.device)).shape
        except (torch.OutOfMemoryError, MemoryError):
            raise UsageError(
                f"{self.device} has not enough memory for a tile of encoder {self.card.name!r}",
                "free some, or take a smaller --encoder",
            ) from None
        except Exception as error:
            if not self.compiled:
                raise
            raise UsageError(
                f"encoder {self.card.name!r} cannot be compiled here ({first_line(error)})",
                "leave out --compile, or install a C++ compiler such as g++",
            ) from None
        if shape != (tried, self.card.dim):
            raise UsageError(
                f"encoder {self.card.name!r} gives {tuple(shape)} for {tried} tiles, "
                f"its card says {self.card.dim} a tile",
                "correct the card's dim or pooling",
            )
        return min(size, self.limit or size)

    def _fitting_batch(self) -> int:
        """A power of two of tiles that takes a fair share of the free memory."""
        need, free = self._tile_bytes(), free_memory(self.device)
        fitting = int(_SHARE[self.device.type] * free / need)
        most = _MOST[self.device.type]
        return min(most, 1 << max(0, fitting.bit_length() - 1))

    def _tile_bytes(self) -> int:
        """What one tile needs at the widest place: a layer's input and output, and as much again.

        Seen by running one, on any device.
        """
        largest = 0

        def see(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            nonlocal largest
            tensors = [x for x in (*inputs, output) if isinstance(x, Tensor)]
            largest = max(largest, sum(x.numel() * x.element_size() for x in tensors))

        hooks = [module.register_forward_hook(see) for module in self.model.modules()]
        run, self._run = self._run, self._pool
        try:
            self(torch.zeros(1, 3, self.card.resize_px, self.card.resize_px, device=self.device))
        finally:
            self._run = run
            for hook in hooks:
                hook.remove()
        return 2 * largest

    def tile_flop(self) -> int:
        """Floating-point operations of the products for one tile."""
        with FlopCounterMode(display=False) as counter:
            self(torch.zeros(1, 3, self.card.resize_px, self.card.resize_px, device=self.device))
        return int(counter.get_total_flops())

    def describe(self) -> dict[str, Any]:
        """Card and weights hash, as they go into the store."""
        return {**self.card.to_dict(), "weights_sha256": self.weights_sha256}


def _cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast once what autocast would cast in every forward pass; the results have the same bits.

    Only of layers that do nothing with their weights but multiply: a subclass may standardise them
    first, in float32.
    """
    for module in model.modules():
        if type(module) in (nn.Linear, nn.Conv2d):
            module.to(dtype)


@dataclass(frozen=True)
class EncoderChoice:
    """What is asked for, as it travels to other processes; fields as `load_encoder`'s arguments."""

    name: str
    weights: Path | None = None
    precision: str = "auto"
    compiled: bool = False

    def load(self, device: torch.device) -> Encoder:
        """The encoder on a device; raises as `load_encoder` does."""
        return load_encoder(self.name, self.weights, device, self.precision, self.compiled)


def load_encoder(
    name: str,
    weights: Path | None,
    device: torch.device,
    precision: str = "auto",
    compiled: bool = False,
) -> Encoder:
    """An encoder with its weights: from a file, from the installed package, or from the hub.

    Args:
        name: A card's name, a plugin's, or any timm architecture.
        weights: A .safetensors file, or a .pth/.bin state dict (loaded without pickle's code).
        device: Where it runs.
        precision: A key of `PRECISIONS`, or "auto": bf16 on a GPU that has it, else fp32.
        compiled: By torch.compile.

    Raises:
        UsageError: Unknown encoder or broken plugin, unreadable or unfitting weights, hub out of
            reach.
    """
    found = find_encoder(name)
    model = found.build()
    if found.model is None:
        load_weights(found.card, model, weights)
    elif weights is not None:
        fit(model, to_timm(read_weights(weights), model), str(weights), name)
    # what a plugin does with its weights nobody knows
    own = found.model is None
    return Encoder(found.card, model, device, precision, compiled, cast_once=own)
