"""Budget of a chat template: count its steps of work, and limit its texts and integers.

Every step is counted, so that a template fails on every machine or on none. A limit of `SECONDS` of
CPU time stops work that the counts miss.
"""

import contextlib
import contextvars
import re
import string
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jinja2.utils import Namespace

BASE = 400_000
"""Number of steps allowed for an empty conversation; 8 characters of text cost one step."""
PER_CHARACTER = 16
"""Number of further steps allowed for each character of the conversation as JSON."""
COPIED = 128
"""Number of bytes of text that `+` and `~` copy for one step."""
GATHERINGS = 4
"""Number of copies of the whole conversation, for each message, that cost only one step per copy. A
loop that builds up a text copies the whole text at each message."""
KEPT = 2**26
"""Number of bytes of copied texts above which the texts that are still in use are counted. If these
texts exceed half of the limit, the template fails. Long conversations have a higher limit."""
BITS = 256  # maximum size of an integer
WIDTH = 10_000  # maximum width of a padded text, and maximum number that a filter takes
SECONDS = 20.0  # of CPU time

_PARENTHESIS = re.compile(r"[()]")
_WIDTHS = re.compile(r"[#0\- +]*(\*|[0-9]*)(?:\.(\*|[0-9]*))?[hlL]?")


class TemplateLimitError(Exception):
    """A template exceeds a limit; the message is one line."""


class Budget:
    """Steps of work and bytes of copied text that a template may still use.

    Args:
        variables: Mapping from name to plain value that the template gets.
        characters: Number of characters of these values as JSON.
    """

    def __init__(self, variables: Mapping[str, Any], characters: int):
        self.total = self.left = BASE + PER_CHARACTER * characters
        # A loop that builds up a text copies it at each message: bytes left for such copies.
        self._longest = GATHERINGS * characters
        self._gathered = self._longest * len(variables.get("messages") or ())
        self._copies: dict[int, str] = {}
        self._kept, self._most = 0, max(KEPT, 16 * self._longest)
        self.known: dict[int, int] = {}
        for value in variables.values():
            self._measure(value)
        self._until, self._charges = time.thread_time() + SECONDS, 0

    def _measure(self, value: Any) -> int:
        """Compute the size of an input, and store the sizes of its objects and lists in `known`."""
        if not isinstance(value, dict | list):
            return self.size(value)
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        self.known[id(value)] = found = 1 + sum(map(self._measure, inner))
        return found

    def charge(self, steps: int, why: str) -> None:
        self.left -= steps
        self._charges += 1
        if self.left < 0:
            raise TemplateLimitError(f"{why} takes more than the {self.total:,} steps it may take")
        if (self._charges % 1024 == 0 or steps > 1000) and time.thread_time() > self._until:
            raise TemplateLimitError(f"{why} takes more than the {SECONDS:.0f} s it may take")

    def copy(self, size: int, why: str) -> None:
        """Charge for copying a text of `size` bytes: one step as long as `GATHERINGS` allows it."""
        gathered = size <= min(self._longest, self._gathered)
        self._gathered -= size * gathered
        self.charge(1 if gathered else 1 + size // COPIED, why)

    def keep(self, text: str, why: str) -> None:
        """Count the memory of a copied text, as long as the template still uses the text.

        A loop that builds up a text drops the last copy at each message; a loop that puts copies
        into a list could fill the memory in few steps. Which copies are in use is only checked when
        all copies together exceed a limit.
        """
        size = sys.getsizeof(text)
        if size <= COPIED:
            return
        self._kept += size
        if self._kept > self._most:
            self._copies = _shared(list(self._copies.values()))
            self._kept = size + sum(map(sys.getsizeof, self._copies.values()))
            if self._kept > self._most // 2:
                raise TemplateLimitError(f"{why} keeps more than {self._most // 2:,} bytes of text")
        self._copies[id(text)] = text

    def size(self, value: Any) -> int:
        """Count the steps to print, compare or hash a value, at most until they exceed `left`."""
        if isinstance(value, str):
            return 1 + len(value) // 8
        found, stack = 0, [value]
        while stack and found <= self.left:
            item = stack.pop()
            if isinstance(item, str):
                found += 1 + len(item) // 8
            elif isinstance(item, int):
                found += 1 + item.bit_length() // 64
            elif id(item) in self.known:
                found += self.known[id(item)]
            elif isinstance(item, Namespace):
                found += 1
                stack.append(object.__getattribute__(item, "_Namespace__attrs"))
            elif isinstance(item, dict):
                found += 1
                stack += [*item, *item.values()]
            else:
                found += top(item)
                if isinstance(item, list | tuple | set | frozenset) or _is_view(item):
                    stack += item
        return found


def _shared(texts: list[str]) -> dict[int, str]:
    """Map `id()` to text for the texts that are also referenced from elsewhere."""
    texts.append("".join(("al", "one")))
    counts = [sys.getrefcount(text) for text in texts]
    # A copy that is still in the budget's own dictionary has one reference more than the last text.
    alone = counts.pop() + 1
    return {id(text): text for text, count in zip(texts, counts, strict=False) if count > alone}


def top(value: Any) -> int:
    """Count the steps to go through a value's items or characters, without the items' contents."""
    if isinstance(value, str):
        return 1 + len(value) // 8
    sized = isinstance(value, list | tuple | dict | set | frozenset | range) or _is_view(value)
    return 1 + len(value) if sized else 1


def _is_view(value: Any) -> bool:
    """Whether a value is the `keys()`, `values()` or `items()` of a mapping."""
    return hasattr(type(value), "mapping")


_budget: contextvars.ContextVar[Budget] = contextvars.ContextVar("budget")


@contextlib.contextmanager
def limited(variables: Mapping[str, Any], characters: int) -> Iterator[None]:
    """Context manager with a new budget for the templates that are compiled and rendered inside.

    Args:
        variables: Mapping from name to plain value that the template gets.
        characters: Number of characters of these values as JSON.
    """
    token = _budget.set(Budget(variables, characters))
    try:
        yield
    finally:
        _budget.reset(token)


def budget() -> Budget:
    return _budget.get()


def make(characters: int, why: str) -> None:
    """Charge the budget for a text of `characters` characters, before the text is made."""
    budget().charge(characters // 8, f"{why}, a text of {characters:,} characters,")


def copy(texts: Iterable[str], why: str) -> None:
    """Charge the budget for copying some texts into one."""
    budget().copy(sum(map(sys.getsizeof, texts)), why)


def width_of(value: Any, why: str) -> int:
    if isinstance(value, int) and abs(value) > WIDTH:
        raise TemplateLimitError(f"{why} of {shown(value)} is above the limit of {WIDTH}")
    return abs(value) if isinstance(value, int) else 0


def shown(number: int) -> str:
    return str(number) if number.bit_length() < 128 else f"{number.bit_length()} bits"


def check_bits(bits: int, text: str) -> None:
    if bits > BITS:
        raise TemplateLimitError(f"{text} is an integer of more than {BITS} bits")


def measure_replace(text: str, old: Any = "", new: Any = "", *_: Any, **__: Any) -> None:
    """Charge the budget for `text.replace(old, new)` before it is computed."""
    make(len(text) + text.count(str(old)) * len(str(new)), "replace")


def measure_percent(text: str, values: Any) -> None:
    """Charge the budget for `text % values` before it is computed."""
    conversions, widths = 0, 0
    for parts in percent_widths(text):
        conversions += 1
        for width in filter(None, parts):
            if width == "*":
                raise TemplateLimitError("a width of * in a format is not offered")
            widths += _format_width(width)
    make(len(text) + widths + conversions * (400 + 8 * budget().size(values)), "a format")


def percent_widths(text: str) -> Iterator[tuple[str, str | None]]:
    """Yield width and precision of each `%` conversion, parsed as Python does, in linear time."""
    at = text.find("%")
    while at >= 0:
        at += 1
        if text.startswith("(", at):  # a key ends where its parentheses close
            depth = 0
            for found in _PARENTHESIS.finditer(text, at):
                depth += 1 if found[0] == "(" else -1
                if depth == 0:
                    at = found.end()
                    break
            else:
                return  # an error of Python
        widths = _WIDTHS.match(text, at)
        assert widths  # all of its parts may be missing
        if not text.startswith("%", widths.end()):  # %% is no conversion, whatever its width
            yield widths[1], widths[2]
        at = text.find("%", widths.end() + 1)  # past the conversion, which may be a second %


def _format_width(width: str) -> int:
    if len(width) > 9 or int(width) > WIDTH:
        raise TemplateLimitError(f"a width of {width[:20]} is above the limit of {WIDTH}")
    return int(width)


def measure_braces(text: str, values: Any) -> None:
    """Charge the budget for `text.format(values)` before it is computed."""
    fields = [field for field in string.Formatter().parse(text) if field[1] is not None]
    widths = 0
    for _, _, form, _ in fields:
        if form and "{" in form:
            raise TemplateLimitError("a width of {} in a format is not offered")
        for width in re.findall(r"\d+", form or ""):
            widths += _format_width(width)
    make(len(text) + widths + len(fields) * (400 + 8 * budget().size(values)), "a format")
