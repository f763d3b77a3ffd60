"""hmil-fast: hierarchical multiple-instance learning on whole-slide images.

The names in `__all__` are the library. Each is imported when it is first used, so that
`import hmil_fast` loads neither torch nor numpy.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors see; `_HOMES` says the same at run time
    from hmil_fast.bags.splits import read_labels
    from hmil_fast.config import TrainConfig
    from hmil_fast.io.slide import open_slide
    from hmil_fast.io.store import open_store
    from hmil_fast.runs.run import open_run

__version__ = "0.1.0"
__all__ = ["TrainConfig", "open_run", "open_slide", "open_store", "read_labels"]

_HOMES = {
    "TrainConfig": "hmil_fast.config",
    "open_run": "hmil_fast.runs.run",
    "open_slide": "hmil_fast.io.slide",
    "open_store": "hmil_fast.io.store",
    "read_labels": "hmil_fast.bags.splits",
}

_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "pyproject.toml").is_file():  # a checkout: kernels/ and io/ lie beside this folder
    __path__ += [str(_ROOT / "hmil_fast"), str(_ROOT)]  # the first: build/tree may lack new modules
del _ROOT, Path


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
