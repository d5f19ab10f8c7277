"""The base of every fact, and how facts are read from and written to files.

A fact is frozen, refuses unknown keys, NaN and infinity, and is checked once, when it is made.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from profiles.errors import FileError

# Limits are far beyond any machine; they keep what is computed from facts finite and whole numbers in 64 bits.
NonNegative = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]
Microseconds = Annotated[float, Field(ge=0, le=1e14, allow_inf_nan=False)]  # three years
Rate = Annotated[float, Field(ge=1, le=1e30, allow_inf_nan=False)]  # per second
Fraction = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10**9)]
NonNegativeCount = Annotated[int, Field(ge=0, le=10**12)]
Width = Annotated[int, Field(ge=1, le=10**7)]  # of a layer
Depth = Annotated[int, Field(ge=1, le=10**4)]  # in layers
Bytes = Annotated[int, Field(ge=0, le=10**16)]
Dtype = Literal["float8", "bfloat16", "float16", "float32", "float64"]


class Facts(BaseModel):
    """Frozen, strict and finite; `load` and `save` speak JSON."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
    )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read one object from a JSON file; FileError names the file, the JSON path and the value."""
        return parse_facts(cls, read_text(path), where=str(path))

    def save(self, path: str | Path) -> None:
        """Write this object as JSON, whole or not at all."""
        write_atomically(path, self.model_dump_json(indent=1) + "\n")


FactsT = TypeVar("FactsT", bound=BaseModel)


def check_writable(path: str | Path) -> None:
    """FileError unless a file can be made at `path`: to be asked before work whose result will be saved there."""
    folder = Path(path).parent
    if not folder.is_dir():
        raise FileError(f"{path}: its folder {folder} does not exist; make it, or choose another")
    _, handle, temporary = _temporary_beside(path)
    os.close(handle)
    temporary.unlink()


def is_file(text: str) -> bool:
    """Whether `text` names an existing file; a text that cannot be a path names none."""
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file; FileError when there is none to be had."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise FileError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def parse_facts(cls: type[FactsT], text: str, *, where: str) -> FactsT:
    """Build `cls` from JSON text; FileError lists up to five wrong places as JSON paths."""
    try:
        return cls.model_validate_json(text)
    except ValidationError as error:
        raise FileError(_explain(error, where)) from None


def _explain(error: ValidationError, where: str) -> str:
    shown = []
    for item in error.errors()[:5]:
        if item["type"] == "json_invalid":
            return f"{where}: not valid JSON ({item['ctx']['error']}); is the file complete?"
        path = "$" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in item["loc"])
        given = "" if item["type"] == "missing" else f" (given: {_shorten(item['input'])})"
        shown.append(f"{path}: {item['msg']}{given}")
    more = error.error_count() - len(shown)
    tail = f"; and {more} more" if more > 0 else ""
    return f"{where}: {'; '.join(shown)}{tail}"


def _shorten(value: object, limit: int = 60) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def write_atomically(path: str | Path, text: str) -> None:
    """Write `text` to a temporary file beside `path`, then rename it into place."""
    target, handle, temporary = _temporary_beside(path)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise FileError(f"{path}: cannot be written ({error.strerror})") from None
        raise


def _temporary_beside(path: str | Path) -> tuple[Path, int, Path]:
    """Where `path` leads (a link stays a link), and an open temporary file in that folder: handle and name."""
    try:
        target = Path(path).resolve()
        if target.exists() and not target.is_file():
            raise FileError(f"{path}: is there and is no regular file; name another")
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    return target, handle, Path(temporary)


def canonical_json(facts: BaseModel) -> str:
    """The one JSON text of these facts that hashes are taken of: sorted keys, no spaces."""
    return json.dumps(facts.model_dump(mode="json", by_alias=True), sort_keys=True, separators=(",", ":"))
