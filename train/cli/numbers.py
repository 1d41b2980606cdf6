"""Check before any work begins that the numbers in a config are within their allowed ranges."""

import dataclasses
import math
from typing import Any

from thoughtbubbles.fields import LARGEST, shown

LARGEST_SEED = 2**63 - 1
_LARGEST_FLOAT = 3e38  # of float32, rounded down


def check_least(config: Any, **least: float) -> None:
    """Raise a ValueError for an option that is below its minimum; None is always allowed.

    Args:
        config: Config whose attributes are the options; every item of a tuple is checked.
        least: Minimum of each option, as `name=minimum`.
    """
    for name, bound in least.items():
        value = getattr(config, name)
        for item in value if isinstance(value, tuple) else (value,):
            if item is not None and item < bound:
                raise ValueError(f"{name}={item} is below {bound}")


def check_numbers(config: Any, above: str = "") -> None:
    """Raise a ValueError if a number in a config is not finite or too large for any option.

    Numbers must fit into 32 bits, like sizes, steps and arrays in JAX, and seeds into 63 bits.
    Positive infinity is allowed only for options in `may_be_infinite` of the config's class, where
    infinity disables clipping.

    Args:
        config: Dataclass to check, including dataclasses nested in its fields.
        above: Prefix of the option names in error messages, such as "model.".
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = f"{above}{field.name}"
        for item in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(item):
                check_numbers(item, f"{name}.")
            elif isinstance(item, float):
                if item == math.inf and field.name in infinite_options(config):
                    continue
                if not abs(item) <= _LARGEST_FLOAT:
                    raise ValueError(f"{name}={item} is out of range: choose a finite number")
            elif isinstance(item, int) and not isinstance(item, bool):
                _check_whole(name, item)


def infinite_options(config: Any) -> frozenset[str]:
    """Return the names of the options of a config, or of its class, that may be infinite."""
    return getattr(config, "may_be_infinite", frozenset())


def _check_whole(name: str, value: int) -> None:
    seed = name.rpartition(".")[2] in ("seed", "seeds")
    least, most = (0, LARGEST_SEED) if seed else (-LARGEST, LARGEST)
    if not least <= value <= most:
        bound = f"at most {most}" if value > most else f"at least {least}"
        raise ValueError(f"{name}={shown(value)} is out of range: choose {bound}")
