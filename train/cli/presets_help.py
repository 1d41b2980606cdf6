"""Describe presets for `--help`, one line each, by their differences from the first preset."""

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

_LEFT_OUT = ("out",)  # the run folder is named after the preset


def presets_text(presets: Mapping[str, Any], width: int | None = None) -> str:
    """Format a heading and one line per preset: the preset's name, and the options it changes.

    Args:
        presets: Mapping from names to configs of one class; the first config is the default.
        width: Maximum number of characters of a line; None takes the width of the terminal. If not
            all options fit, the line ends with the number of omitted options.
    """
    width = width or shutil.get_terminal_size().columns
    default, *others = presets
    indent = max(map(len, presets)) + 4
    changes = {name: dict(differences(presets[default], presets[name])) for name in others}
    # Options with many different values come first: sizes before what all large presets share.
    values: dict[str, set[str]] = {}
    for option, value in (item for found in changes.values() for item in found.items()):
        values.setdefault(option, set()).add(value)
    lines = ["presets (the first word; options override its values):"]
    lines += [f"  {default:<{indent - 2}}the default"]
    for name in others:
        ordered = sorted(changes[name].items(), key=lambda item: -len(values[item[0]]))
        text = _fitting([f"{option}={value}" for option, value in ordered], width - indent)
        lines.append(f"  {name:<{indent - 2}}{text}")
    return "\n".join(lines)


def differences(first: Any, other: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the value in `other` of each option that differs in `first`."""
    for field in dataclasses.fields(first):
        before, now = getattr(first, field.name), getattr(other, field.name)
        if before == now or (not prefix and field.name in _LEFT_OUT):
            continue
        name = prefix + field.name
        if dataclasses.is_dataclass(now) and type(now) is type(before):
            yield from differences(before, now, f"{name}.")
        else:
            yield name, " ".join(map(str, now)) or "()" if isinstance(now, tuple) else str(now)


def _fitting(changes: list[str], width: int) -> str:
    """Join as many changes as fit into a line, and append the number of omitted changes."""
    for shown in range(len(changes), 0, -1):
        left = len(changes) - shown
        text = ", ".join(changes[:shown]) + (f", and {left} more" if left else "")
        if len(text) <= width:
            return text
    return f"{changes[0][: width - 3]}..." if changes else "as the default"
