"""The folder map and its editable form; every other setting lives in pyproject.toml."""

import runpy
import sys

from setuptools import find_namespace_packages, setup

FOLDERS = {"hmil_fast.": "hmil_fast", "hmil_fast.kernels.": "kernels", "hmil_fast.io.": "io"}
if "editable_wheel" in sys.argv:  # `pip install -e`: links, where type checkers find every module
    runpy.run_path("tests/package_tree.py")["main"]()
    FOLDERS = {"": "build/tree"}

setup(
    package_dir={prefix.rstrip("."): folder for prefix, folder in FOLDERS.items()},
    packages=[
        f"{prefix}{name}".rstrip(".")
        for prefix, folder in FOLDERS.items()
        for name in ("", *find_namespace_packages(folder))
        if prefix or name
    ],
)
