"""Import and export feature files of other tools."""

from hmil_fast.io.interchange.bag import Bag, Hints
from hmil_fast.io.interchange.exporter import export_slide
from hmil_fast.io.interchange.formats import FORMATS, Format, find_files
from hmil_fast.io.interchange.importer import Taken, import_file, likely_spec

__all__ = [
    "FORMATS",
    "Bag",
    "Format",
    "Hints",
    "Taken",
    "export_slide",
    "find_files",
    "import_file",
    "likely_spec",
]
