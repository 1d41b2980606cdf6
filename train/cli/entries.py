"""Check the entries of registries, including plugins' entries, before any work begins."""

import dataclasses
import inspect
from typing import Any

from thoughtbubbles import ARCHITECTURES, Architecture, ArchitectureConfig
from thoughtbubbles.policies import POLICIES
from thoughtbubbles.policy import check_policy

# A subclass of `Architecture` must define at least one method of each pair.
_WRITTEN = (("embed_tokens", "run"), ("hidden_states", "run"), ("unembed", "logits"))
_SEE = "docs/architecture.md has an example"


def check_entries() -> None:
    """Raise a one-line ValueError if an entry of `ARCHITECTURES` or `POLICIES` is incomplete."""
    for name, entry in ARCHITECTURES.items():
        _check_architecture(name, entry)
    for name, entry in POLICIES.items():
        check_dataclass("policy", name, entry)
        check_policy(entry, f"the policy {name}")


def check_dataclass(kind: str, name: str, entry: Any) -> None:
    """Raise a ValueError unless an entry of a registry is a dataclass, whose fields are options.

    Args:
        kind: Noun for the entries of the registry, such as "policy".
        name: Name of the entry.
        entry: Entry of the registry, which may be any object.
    """
    if not (isinstance(entry, type) and dataclasses.is_dataclass(entry)):
        raise ValueError(
            f"{kind} {name}: {entry!r} is no dataclass, so that its options are unknown: put "
            "@dataclasses.dataclass(frozen=True) above the class"
        )


def _check_architecture(name: str, entry: Any) -> None:
    where = f"architecture {name}"
    if not (isinstance(entry, type) and issubclass(entry, Architecture)):
        raise ValueError(f"{where}: {entry!r} does not derive from thoughtbubbles.Architecture")
    config = getattr(entry, "config_class", None)
    if not (isinstance(config, type) and issubclass(config, ArchitectureConfig)):
        raise ValueError(
            f"{where}: {entry.__name__}.config_class is {config!r}: set it to a dataclass that "
            "derives from ArchitectureConfig"
        )
    check_dataclass("config of the architecture", name, config)
    try:
        inspect.signature(entry).bind(None, rngs=None, constrain=None, attend=None)
    except TypeError as error:
        raise ValueError(
            f"{where}: {entry.__name__}.__init__: {error}: write "
            f"def __init__(self, config, *, rngs, constrain=None, attend=None); {_SEE}"
        ) from None
    for either in _WRITTEN:
        if all(getattr(entry, method) is getattr(Architecture, method) for method in either):
            raise ValueError(
                f"{where}: {entry.__name__} has no {' or '.join(either)} of its own: write it; "
                f"{_SEE}"
            )
