"""Fields of a row of published runs, which may be missing or "not stated"."""

from typing import Any

Row = dict[str, Any]


class UnpricedError(Exception):
    """Why a row has no prediction."""


def stated(row: Row, name: str) -> Any:
    """A field of a row, or None where it is missing or "not stated"."""
    value = row.get(name)
    return None if isinstance(value, str) and (value.startswith("not stated") or value == "unknown") else value


def text_of(row: Row, name: str) -> str:
    """A field of a row as lower-case text; empty where it is not stated."""
    value = stated(row, name)
    return str(value).lower() if value is not None else ""
