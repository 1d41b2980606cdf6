"""Typed access to JSON and other metadata, with one-line errors that name file and field."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LARGEST = 2**31 - 1  # JAX indexes with 32 bits
_REQUIRED: Any = object()


def shown(value: Any, longest: int = 60) -> str:
    """Return the `repr` of a value for a message, truncated to `longest` characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # too many digits, too deep
        text = f"a huge {type(value).__name__}"
    return cut(text, longest)


def cut(text: str, longest: int = 60) -> str:
    """Return a text for a message, truncated to `longest` characters with "..." at the end."""
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


class Fields:
    """Typed access to the fields of a JSON object: one method per type; null counts as missing.

    For a missing field, methods with an argument `default` return the default, or raise a
    ValueError if no default is given. All methods but `raw` and `names` raise a ValueError for a
    value of another type or range.

    Args:
        content: Mapping from the name of a field to its value, as read from a file.
        source: Name of the file in error messages.
        whole: End of the message about a missing field, such as "it is no whole config".
        remedy: End of the message about a wrong value, which tells what to do.
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
        """Read an integer from `least` to `most`; the file may write 32 as 32.0."""

        def fits(value: Any) -> bool:
            return _is_whole(value) and least <= value <= most

        found = self._read(name, default, fits, f"a whole number from {least} to {most}")
        return int(found) if type(found) is float else found

    def number(self, name: str, default: Any = _REQUIRED, *, positive: bool = True) -> Any:
        """Read a finite number as a float; with `positive`, the number must be above 0."""

        def fits(value: Any) -> bool:
            if type(value) not in (int, float) or abs(value) > 1e300 or not math.isfinite(value):
                return False
            return value > 0 or not positive

        found = self._read(name, default, fits, "a positive number" if positive else "a number")
        return float(found) if type(found) is int else found

    def flag(self, name: str, default: Any = _REQUIRED) -> Any:
        """Read a bool."""
        return self._read(name, default, lambda value: type(value) is bool, "true or false")

    def text(self, name: str, default: Any = _REQUIRED) -> Any:
        """Read a string."""
        return self._read(name, default, lambda value: isinstance(value, str), "a text")

    def object(self, name: str) -> "Fields":
        """Read a nested object as `Fields`; a missing object has no fields."""
        found = self._read(name, {}, lambda value: isinstance(value, dict), "an object")
        return Fields(found, f"{self.source}: {name}", self._whole, self._remedy)

    def list(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        """Read a list of values of the type `kind`; the file may write an integer 32 as 32.0."""

        def fits(value: Any) -> bool:
            is_one = _is_whole if kind is int else lambda item: type(item) is kind
            return isinstance(value, list) and all(map(is_one, value))

        found = self._read(name, default, fits, f"a list of {kind.__name__}")
        given = found is not default and kind is int
        return [int(item) for item in found] if given else found

    def ids(self, name: str) -> "list[int]":
        """Read a token id or a list of token ids as a list, without ids of -1; empty if missing."""

        def fits(value: Any) -> bool:
            return _is_whole(value) and -1 <= value <= LARGEST

        def all_fit(value: Any) -> bool:
            return fits(value) or (isinstance(value, list) and all(map(fits, value)))

        found = self._read(name, [], all_fit, "a token id or a list of them")
        ids = found if isinstance(found, list) else [found]
        return [int(index) for index in ids if index != -1]

    def token(self, name: str) -> str | None:
        """Read a special token, a string or an object with a string `content`; None if missing."""
        value = self._content.get(name)
        if isinstance(value, dict):
            value = value.get("content", value)
        fits = value is None or isinstance(value, str)
        return value if fits else self._refuse(name, "a token")

    def raw(self, name: str) -> Any:
        """Return a value from the file without checks; None if the field is missing."""
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
    """Read a regular UTF-8 file; raise a ValueError if the file is missing or not UTF-8."""
    if not path.is_file():  # a pipe would never end
        raise ValueError(f"{path} is no regular file: put one there")
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise ValueError(f"{path} is not UTF-8: copy it again, or save it as UTF-8") from error


def parse_object(text: str | bytes, source: str) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        text: JSON text.
        source: Name of the file in error messages.

    Raises:
        ValueError: The text is not JSON, or is a JSON value other than an object.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{source} is not a JSON object: copy it again, or export it anew")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; raise a ValueError if file or object is missing."""
    return parse_object(read_text(path), str(path))
