"""The folder map; every other setting lives in pyproject.toml."""

from setuptools import find_namespace_packages, setup

FOLDERS = {"hmil_fast": "hmil_fast", "hmil_fast.kernels": "kernels", "hmil_fast.io": "io"}

setup(
    package_dir=FOLDERS,
    packages=[
        name
        for package, folder in FOLDERS.items()
        for name in (package, *(f"{package}.{sub}" for sub in find_namespace_packages(folder)))
    ],
)
