"""Read the pickled splits of the HMIL release without unpickling: no code in them can run."""

import io
import pickle  # noqa: TID251 - only behind the unpickler below, which knows no names at all
import pickletools
from pathlib import Path
from typing import Any

from hmil_fast.errors import UsageError

_MAX_BYTES = 8 * 2**20  # some 50,000 slides; a byte may ask for an empty list, 64 bytes in memory
_NOT_PLAIN = {"EMPTY_SET", "FROZENSET", "BYTEARRAY8", "LONG4"}  # sets, bytes, endless numbers


class _Plain(pickle.Unpickler):
    """Knows lists, tuples, dicts, strings and numbers; every other name is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise UsageError(
            f"the pickle asks for {module}.{name}, splits are lists of text",
            "do not open this file elsewhere either, it may run a program; write the split as CSV",
        )


def read_plain_pickle(path: Path) -> object:
    """The lists, tuples, dicts, strings and numbers of a pickle.

    Raises:
        UsageError: The file is missing, too large, damaged, or holds anything else, which is named
            and not run.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "check the path") from None
    if len(data) > _MAX_BYTES:
        raise UsageError(f"{path} is larger than 8 MiB", "give the split file, not the data")
    try:
        for code, number, _ in pickletools.genops(data):
            # the memo is an array: a large index alone would allocate gigabytes
            if code.name.endswith("PUT") and int(number or 0) > len(data):
                raise ValueError(f"memo index {number}")
            if code.name in _NOT_PLAIN:
                raise ValueError(f"it holds a {code.name}")
        return _Plain(io.BytesIO(data)).load()
    except UsageError as error:
        raise UsageError(f"{path}: {error.what}", error.fix) from None
    except Exception as error:  # noqa: BLE001 - a damaged pickle raises whatever it likes
        raise UsageError(
            f"{path} is not a pickle of plain lists ({type(error).__name__}: {error})",
            "check that it is a split file, or write the split as CSV",
        ) from None
