"""Print the lowest releases that pyproject.toml allows, as constraints for `make test-oldest`.

The tools of the extra `test` are left out: what they are does not reach a user.
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def floors() -> list[str]:
    """A line `name==release` for each dependency of the package and of its extras."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    extras = project["optional-dependencies"]
    asked = [line for name in extras if name not in ("bench", "test") for line in extras[name]]
    found = (re.match(r"([\w.-]+)>=([\w.]+)", line) for line in project["dependencies"] + asked)
    return [f"{match[1]}=={match[2]}" for match in found if match]


if __name__ == "__main__":
    print("\n".join(floors()))
