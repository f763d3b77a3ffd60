"""Constexpr arguments and launch options of a fused kernel, from its configuration."""

from typing import Any, Protocol


class Config(Protocol):
    """A NamedTuple of a kernel's constexpr arguments, and of num_warps and num_stages."""

    def _asdict(self) -> dict[str, Any]: ...


def constants(config: Config) -> dict[str, Any]:
    """The constexpr arguments."""
    return {k: v for k, v in config._asdict().items() if not k.startswith("num_")}


def options(config: Config) -> dict[str, Any]:
    """The launch options; without the last Triton 3.9 warns and 3.10 is slower."""
    launch = {k: v for k, v in config._asdict().items() if k.startswith("num_")}
    return {**launch, "enable_fp_fusion": True}
