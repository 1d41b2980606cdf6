"""Registries: dictionaries from the names that configs and options use to classes."""

import keyword
from collections.abc import Mapping, MutableMapping
from typing import Any, Self, TypeVar

T = TypeVar("T")
_OURS = ("thoughtbubbles", "train")


class Registry(dict[str, type[T]]):
    """Dictionary from names to classes that other modules may add to.

    A name of the library keeps its meaning, so that a saved run that names it is what it was. A
    class of the user's may be registered again under its name, as a notebook does.

    Attributes:
        kind: Noun for the entries in error messages, such as "policy".
    """

    def __init__(self, kind: str, entries: Mapping[str, type[T]]):
        """Make a registry.

        Args:
            kind: Noun for the entries in error messages.
            entries: Names and classes of the first entries.
        """
        super().__init__(entries)
        self.kind = kind

    def __setitem__(self, name: str, entry: type[T]) -> None:
        """Add an entry.

        Raises:
            ValueError: The name belongs to an entry of the library, or cannot be written as a call
                with options, such as "my-task".
        """
        if not (name.isidentifier() and not keyword.iskeyword(name)):
            raise ValueError(
                f"{self.kind} {name!r}: choose a name of letters, digits and underscores, such as "
                "my_name, so that name(option=value) can be written"
            )
        known = self.get(name)
        if is_ours(known) and _path(known) != _path(entry):
            raise ValueError(
                f"{self.kind} {name!r} is {_path(known)[1]} of the library: register "
                f"{getattr(entry, '__name__', entry)} by another name"
            )
        super().__setitem__(name, entry)

    # Those of a dict don't call `__setitem__`.
    update = MutableMapping.update
    setdefault = MutableMapping.setdefault

    def __ior__(self, entries: Any) -> Self:
        """Add entries, a mapping or pairs of name and class, each of which is checked."""
        self.update(entries)
        return self


def is_ours(entry: Any) -> bool:
    """Return whether an entry is a class of the library's own."""
    return isinstance(entry, type) and entry.__module__.partition(".")[0] in _OURS


def _path(entry: Any) -> tuple[Any, Any]:
    return getattr(entry, "__module__", None), getattr(entry, "__qualname__", None)
