"""hmil-fast: hierarchical multiple-instance learning on whole-slide images."""

from pathlib import Path

__version__ = "0.1.0"

_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "pyproject.toml").is_file():  # a checkout: kernels/ and io/ lie beside this folder
    __path__.append(str(_ROOT))
del _ROOT, Path
