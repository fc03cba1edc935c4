"""Numbers and values as the card and the page show them."""

from __future__ import annotations

import json


def number(value: float | None) -> str:
    """A count with commas, any other number with six digits; empty for None."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def shown(value: object, longest: int) -> str:
    """A text unchanged, anything else as JSON; cut to `longest` characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= longest else text[: longest - 1] + "…"
