"""The page docs/accuracy.md around the tables."""

from typing import Any


def page(results: dict[str, Any], tables: str) -> str:
    """The whole page in Markdown."""
    rates = ", ".join(
        f"{name} {settings['lr']:g}"
        for name, settings in results["settings"].items()
        if name != "pooled-lr"
    )
    return f"""# Accuracy on real data

{tables}
Learning rates: {rates}.
"""
