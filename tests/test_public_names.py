"""`import hmil_fast` offers the library by name and loads none of it before a name is used."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import hmil_fast

SOURCE = Path(hmil_fast.__file__).read_text(encoding="utf-8")


def test_importing_the_package_loads_no_other_module_of_it_and_no_heavy_library() -> None:
    code = "import sys, hmil_fast; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert [name for name in loaded if name.startswith("hmil_fast")] == ["hmil_fast"]
    assert {"torch", "numpy", "zarr", "rich", "argparse"}.isdisjoint(loaded)


@pytest.mark.parametrize("name", hmil_fast.__all__)
def test_every_name_is_there_documented_and_listed(name: str) -> None:
    value = getattr(hmil_fast, name)
    assert inspect.getdoc(value)
    assert name in dir(hmil_fast)


def test_at_most_fifteen_names_and_no_others() -> None:
    assert len(hmil_fast.__all__) <= 15
    with pytest.raises(AttributeError, match="nothing_like_this"):
        hmil_fast.nothing_like_this  # noqa: B018


def test_type_checkers_see_the_names_that_are_imported() -> None:
    blocks = [node for node in ast.parse(SOURCE).body if isinstance(node, ast.If)]
    (block,) = (node for node in blocks if ast.unparse(node.test) == "TYPE_CHECKING")
    typed = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == hmil_fast._HOMES
    assert sorted(typed) == hmil_fast.__all__
