"""Typed reading of files that others wrote: every wrong value is one line with file and field."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LARGEST = 2**31 - 1  # JAX indexes with 32 bits
_REQUIRED: Any = object()


def shown(value: Any, longest: int = 60) -> str:
    """A value as it may stand in a line, however long it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # too many digits, too deep
        text = f"a huge {type(value).__name__}"
    return cut(text, longest)


def cut(text: str, longest: int = 60) -> str:
    """A text as it may stand in a line, however long it is."""
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


class Fields:
    """Fields of an object, each read as one type; None counts as missing.

    Args:
        content: Names and values as they come from a file.
        source: Name of the file in error messages.
        whole: End of the message on a missing field, such as "it is no whole config".
        remedy: End of the message on a wrong value, what to do about it.
    """

    def __init__(
        self,
        content: Mapping[str, Any],
        source: str,
        whole: str = "copy it again, or export it anew",
        remedy: str = "correct it, or export it anew",
    ):
        self._content, self.source = content, source
        self._whole, self._remedy = whole, remedy

    def integer(
        self, name: str, default: Any = _REQUIRED, *, least: int = 1, most: int = LARGEST
    ) -> Any:
        """A whole number between two bounds, which may be written as 32.0, or the default."""

        def fits(value: Any) -> bool:
            return _is_whole(value) and least <= value <= most

        found = self._read(name, default, fits, f"a whole number from {least} to {most}")
        return int(found) if type(found) is float else found

    def number(self, name: str, default: Any = _REQUIRED, *, positive: bool = True) -> Any:
        """A finite number, above 0 unless `positive` is false, or the default."""

        def fits(value: Any) -> bool:
            if type(value) not in (int, float) or abs(value) > 1e300 or not math.isfinite(value):
                return False
            return value > 0 or not positive

        found = self._read(name, default, fits, "a positive number" if positive else "a number")
        return float(found) if type(found) is int else found

    def flag(self, name: str, default: Any = _REQUIRED) -> Any:
        """True or False, or the default."""
        return self._read(name, default, lambda value: type(value) is bool, "true or false")

    def text(self, name: str, default: Any = _REQUIRED) -> Any:
        """A text, or the default."""
        return self._read(name, default, lambda value: isinstance(value, str), "a text")

    def object(self, name: str) -> "Fields":
        """The fields of an object, none if it is missing."""
        found = self._read(name, {}, lambda value: isinstance(value, dict), "an object")
        return Fields(found, f"{self.source}: {name}", self._whole, self._remedy)

    def list(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        """A list of values of one type, or the default; an int may be written as 32.0."""

        def fits(value: Any) -> bool:
            is_one = _is_whole if kind is int else lambda item: type(item) is kind
            return isinstance(value, list) and all(map(is_one, value))

        found = self._read(name, default, fits, f"a list of {kind.__name__}")
        given = found is not default and kind is int
        return [int(item) for item in found] if given else found

    def ids(self, name: str) -> "list[int]":
        """Token ids: one, a list of them, or none, which -1 means too."""

        def fits(value: Any) -> bool:
            return _is_whole(value) and -1 <= value <= LARGEST

        def all_fit(value: Any) -> bool:
            return fits(value) or (isinstance(value, list) and all(map(fits, value)))

        found = self._read(name, [], all_fit, "a token id or a list of them")
        ids = found if isinstance(found, list) else [found]
        return [int(index) for index in ids if index != -1]

    def token(self, name: str) -> str | None:
        """A special token: a text, an object with one as `content`, or none."""
        value = self._content.get(name)
        if isinstance(value, dict):
            value = value.get("content", value)
        fits = value is None or isinstance(value, str)
        return value if fits else self._refuse(name, "a token")

    def raw(self, name: str) -> Any:
        """A value as it stands in the file."""
        return self._content.get(name)

    def names(self) -> "list[str]":
        """Names of all fields that have a value."""
        return [name for name, value in self._content.items() if value is not None]

    def _read(self, name: str, default: Any, fits: Any, kind: str) -> Any:
        value = self._content.get(name)
        if value is None and default is not _REQUIRED:
            return default
        if value is None:
            raise ValueError(f"{self.source} has no {name}: {self._whole}")
        return value if fits(value) else self._refuse(name, kind)

    def _refuse(self, name: str, kind: str) -> Any:
        value = shown(self._content[name])
        raise ValueError(f"{self.source}: {name}={value} is not {kind}: {self._remedy}")


def _is_whole(value: Any) -> bool:
    return type(value) is int or (type(value) is float and value.is_integer())


def read_text(path: Path) -> str:
    """The text of a regular file; a ValueError if there is none."""
    if not path.is_file():  # a pipe would never end
        raise ValueError(f"{path} is no regular file: put one there")
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise ValueError(f"{path} is not UTF-8: copy it again, or save it as UTF-8") from error


def parse_object(text: str | bytes, source: str) -> dict[str, Any]:
    """The object that a text holds; a ValueError if it holds none.

    Args:
        text: JSON.
        source: Name of the file in error messages.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{source} is not a JSON object: copy it again, or export it anew")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; a ValueError if it holds none."""
    return parse_object(read_text(path), str(path))
