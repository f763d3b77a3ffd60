"""hmil-fast: hierarchical multiple-instance learning on whole-slide images.

The names in `__all__` are the library. Each is imported when it is first used, so that
`import hmil_fast` loads neither torch nor numpy, and takes milliseconds.
"""

from importlib import import_module
from os.path import dirname, isfile, join, realpath  # pathlib and typing take longer to import

TYPE_CHECKING = False
if TYPE_CHECKING:  # what type checkers and editors see; `_HOMES` says the same at run time
    from hmil_fast.api.evaluate import compare, evaluate
    from hmil_fast.api.extract import extract
    from hmil_fast.api.predict import predict
    from hmil_fast.api.report import heatmap
    from hmil_fast.api.slides import find_tissue, tile_grid
    from hmil_fast.api.train import train
    from hmil_fast.bags.splits import read_labels
    from hmil_fast.config import Runtime, TrainConfig
    from hmil_fast.io.slide import open_slide
    from hmil_fast.io.store import open_store
    from hmil_fast.recipe import Recipe
    from hmil_fast.runs.run import open_run

__version__ = "0.1.0"
__all__ = [
    "Recipe",
    "Runtime",
    "TrainConfig",
    "compare",
    "evaluate",
    "extract",
    "find_tissue",
    "heatmap",
    "open_run",
    "open_slide",
    "open_store",
    "predict",
    "read_labels",
    "tile_grid",
    "train",
]

_HOMES = {
    "Recipe": "hmil_fast.recipe",
    "Runtime": "hmil_fast.config",
    "TrainConfig": "hmil_fast.config",
    "compare": "hmil_fast.api.evaluate",
    "evaluate": "hmil_fast.api.evaluate",
    "extract": "hmil_fast.api.extract",
    "find_tissue": "hmil_fast.api.slides",
    "heatmap": "hmil_fast.api.report",
    "open_run": "hmil_fast.runs.run",
    "open_slide": "hmil_fast.io.slide",
    "open_store": "hmil_fast.io.store",
    "predict": "hmil_fast.api.predict",
    "read_labels": "hmil_fast.bags.splits",
    "tile_grid": "hmil_fast.api.slides",
    "train": "hmil_fast.api.train",
}

_ROOT = dirname(dirname(realpath(__file__)))
if isfile(join(_ROOT, "pyproject.toml")):  # a checkout: kernels/ and io/ lie beside this folder
    __path__ += [join(_ROOT, "hmil_fast"), _ROOT]  # the first: build/tree may lack new modules
del dirname, isfile, join, realpath


def __getattr__(name: str) -> object:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
