"""Make frozen dataclasses from JSON, with each value checked against the type of its field."""

import contextlib
import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any

from thoughtbubbles.fields import shown
from thoughtbubbles.policies import POLICIES
from thoughtbubbles.policy import Policy

_LARGEST = 2**63 - 1


def from_json(kind: type[Any], fields: Any, name: str, policy: Callable[[Any], Policy]) -> Any:
    """Make an instance of a dataclass from a JSON object of its fields.

    Args:
        kind: Dataclass to instantiate.
        fields: Values of the fields, as parsed from JSON.
        name: Name of the object in error messages.
        policy: Function from the JSON value of a fork policy to the policy; it raises a TypeError
            for a value that does not describe a policy.

    Returns:
        Instance of the dataclass.

    Raises:
        ValueError: A field is unknown, missing or of a wrong type.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"{name}={shown(fields)} is no object with fields of {kind.__name__}")
    hints = typing.get_type_hints(kind)
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    if unknown := sorted(fields.keys() - known):
        raise ValueError(f"{name} has no field {shown(unknown[0])}: a newer version may have it")
    if missing := sorted(required_options(kind) - fields.keys()):
        raise ValueError(f"{name} lacks {missing[0]!r}, which this version needs")
    found = {}
    for field, value in fields.items():
        try:
            found[field] = _value(hints[field], value, f"{name}: {field}", policy)
        except TypeError:
            expected = getattr(hints[field], "__name__", str(hints[field]))
            line = f"{name}: {field}={shown(value)} is not {expected}"
            raise ValueError(line) from None
    return kind(**found)


def _value(kind: Any, value: Any, name: str, policy: Callable[[Any], Policy]) -> Any:
    """Convert a JSON value to the type of its field; raise a TypeError if it does not fit."""
    if kind is Policy or kind in POLICIES.values():
        return policy(value)
    if dataclasses.is_dataclass(kind):
        return from_json(typing.cast(Any, kind), value, name, policy)
    choices = typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if value is None and type(None) in choices:
            return None
        rest = [choice for choice in choices if choice is not type(None)]
        if len(rest) == 1:
            return _value(rest[0], value, name, policy)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError
        inner = choices[:1] * len(value) if choices[1:] == (...,) else choices
        if len(inner) != len(value):
            raise TypeError
        return tuple(_value(of, item, name, policy) for of, item in zip(inner, value, strict=True))
    return typed(value, kind)


def typed(value: Any, kind: Any) -> Any:
    """Check that a value has a type, and return the value; an int becomes a float for type float.

    Args:
        value: Value to check, such as one parsed from JSON.
        kind: Type annotation: a class, a `Literal` or a union.

    Raises:
        TypeError: The value has another type, or an integer has more than 64 bits.
    """
    origin = typing.get_origin(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for choice in typing.get_args(kind):
            with contextlib.suppress(TypeError):
                return typed(value, choice)
    elif origin is typing.Literal:
        choices = typing.get_args(kind)
        if any(value == choice and type(value) is type(choice) for choice in choices):
            return value
    elif kind is float and type(value) is int:
        return float(value)
    elif kind is int and type(value) is int and abs(value) > _LARGEST:
        raise TypeError(f"{value} has more than 64 bits")
    elif isinstance(value, origin or kind) and isinstance(value, bool) == (kind is bool):
        return value
    raise TypeError(f"{value!r} is not {kind}")


def required_options(chosen: type[Any]) -> set[str]:
    """Return the names of a dataclass's fields (see `fields_of`) that have no default."""
    return {f.name for f in fields_of(chosen) if f.default is f.default_factory}  # both MISSING


def fields_of(chosen: Any) -> list[dataclasses.Field[Any]]:
    """Return the fields of a dataclass that configs may set: fields in both its init and repr."""
    return [field for field in dataclasses.fields(chosen) if field.init and field.repr]
