"""Fill the report's jinja2 templates; every value is escaped."""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from hmil_fast.report.html.tables import counted

if TYPE_CHECKING:
    from jinja2 import Environment


def fill(template: str, **values: object) -> str:
    """Fill a template of this folder.

    Args:
        template: Name of the file, for instance "page.html".
        values: What the template names; text is escaped unless it is `markupsafe.Markup`.

    Raises:
        jinja2.UndefinedError: The template names a value that is missing.
    """
    return _environment().get_template(template).render(values)


@lru_cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["counted"] = counted
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment
