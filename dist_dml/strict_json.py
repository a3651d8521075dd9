"""JSON that others wrote, read without trust: one object, no name twice, no numbers beyond JSON's.

What it holds is then checked by a `StrictModel`. Whoever reads a file turns the ValueErrors from
here into one line with the file's name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Natural = Annotated[int, Field(ge=0, lt=2**63)]


class StrictModel(BaseModel):
    """Nothing is converted: a number in quotes is no number. Unknown fields are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def read_object(path: Path, most_bytes: int) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: of the file.
        most_bytes: a larger file is not read to its end.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such object; one line.
    """
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"it has more than {most_bytes} bytes")
    try:
        # Bytes would be taken for UTF-16 too.
        text = content.decode("utf-8")
        found = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_refuse)
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON at line {error.lineno}: {error.msg}") from None
    except RecursionError:
        raise ValueError("too many levels of nesting") from None
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__} instead of an object")
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets a name stand twice, and Python would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _refuse(text: str) -> NoReturn:
    """Python reads NaN and Infinity, which are no JSON."""
    raise ValueError(f"{text} is no number of JSON")


def first_problem(error: ValidationError) -> str:
    """The first thing that a model refused, in a few words of one line."""
    first = error.errors(include_url=False, include_context=False)[0]
    message = " ".join(first["msg"].removeprefix("Value error, ").split())
    if not first["loc"]:
        return message
    place = ".".join(str(part) for part in first["loc"])
    return f"{place!a:.80}: {message[:1].lower()}{message[1:]}"
