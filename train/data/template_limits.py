"""The sandbox of chat templates: no attribute of Python's own, and a budget of work and memory.

A template comes with weights, so anybody may have written it, and Jinja's sandbox keeps it from
Python's internals only: `'%999999999d' % 1` would take 7 GB, `9**(9**9)` would never end. Here
each loop, call, filter, operator and output takes from a budget that grows with the conversation
(`BASE`, `PER_CHARACTER`), and what would allocate is measured first. The limits are counted, not
timed: a template fails on every machine or on none.
"""

import contextlib
import contextvars
import functools
import json
import re
import string
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

BASE = 400_000
"""Steps of a template on an empty conversation; 8 characters of text take one step."""
PER_CHARACTER = 16
"""Steps more for each character of the conversation as JSON."""
LONGEST_TEMPLATE = 200_000
BITS = 256  # of an integer
WIDTH = 10_000  # of a padded text, and of what else a filter takes a number for
SECONDS = 20.0  # of CPU time, for work that is not counted

UNSAFE = {"translate", "maketrans", "expandtabs", "to_bytes", "from_bytes"}
_PADS = {"center", "ljust", "rjust", "zfill"}
# Filters that look at the top of a value alone, not at what it holds.
_SHALLOW = {
    "length", "count", "first", "last", "list", "map", "select", "selectattr", "reject",
    "rejectattr", "reverse", "items", "default", "d", "attr", "batch", "slice",
}  # fmt: skip
_SIZED = {"center", "indent", "batch", "slice", "truncate", "round"}
_GONE = {"wordwrap", "urlize"}  # of web pages
_COMPARING = {
    "eq", "equalto", "==", "ne", "!=", "lt", "lessthan", "<", "le", "<=", "gt", "greaterthan", ">",
    "ge", ">=", "in", "lower", "upper",
}  # fmt: skip
_FORMAT = re.compile(r"%(?:\(.*?\))?[#0\- +]*(\*|\d*)(?:\.(\*|\d*))?")


class TemplateLimitError(Exception):
    """A template asks for more than its limits; one line."""


class _Budget:
    def __init__(self, variables: Mapping[str, Any], characters: int):
        self.total = self.left = BASE + PER_CHARACTER * characters
        self.known: dict[int, int] = {}
        for value in variables.values():
            self._measure(value)
        self._until, self._charges = time.thread_time() + SECONDS, 0

    def _measure(self, value: Any) -> int:
        """Size of an input, a tree; those of its objects and lists are kept."""
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
        if self._charges % 1024 == 0 and time.thread_time() > self._until:
            raise TemplateLimitError(f"{why} takes more than the {SECONDS:.0f} s it may take")

    def size(self, value: Any) -> int:
        """Steps that it takes to print, compare or hash a value, counted up to those left."""
        if isinstance(value, str):
            return 1 + len(value) // 8
        found, stack = 0, [value]
        while stack and found <= self.left:
            item = stack.pop()
            if isinstance(item, str | bytes):
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
                if isinstance(item, list | tuple | set | frozenset):
                    stack += item
        return found


def top(value: Any) -> int:
    """Steps that it takes to go through a value without what it holds."""
    if isinstance(value, str | bytes):
        return 1 + len(value) // 8
    sized = isinstance(value, list | tuple | dict | set | frozenset | range) or hasattr(
        type(value), "mapping"
    )
    return 1 + len(value) if sized else 1


_budget: contextvars.ContextVar[_Budget] = contextvars.ContextVar("budget")


@contextlib.contextmanager
def limited(variables: Mapping[str, Any], characters: int) -> Iterator[None]:
    """A budget for what is compiled and rendered inside.

    Args:
        variables: Plain values that the template gets.
        characters: Their length as JSON.
    """
    token = _budget.set(_Budget(variables, characters))
    try:
        yield
    finally:
        _budget.reset(token)


def tick(steps: int) -> None:
    """A turn of a loop, or a call of a macro."""
    _budget.get().charge(steps, "a loop")


def seen(value: Any) -> Any:
    """A value that is compared or looked up."""
    budget = _budget.get()
    budget.charge(budget.size(value), "a comparison")
    return value


def walked(value: Any) -> Any:
    """A value that a loop goes through, also where a condition skips its items."""
    _budget.get().charge(top(value), "a loop")
    return value


def joined(*values: Any) -> str:
    """`a ~ b`."""
    return "".join(str(_printed(value, "the operator ~")) for value in values)


def _printed(value: Any, why: str = "the output") -> Any:
    budget = _budget.get()
    budget.charge(budget.size(value), why)
    return value


_OWN: tuple[Callable[..., Any], ...] = (tick, seen, walked, joined)


def _make(characters: int, why: str) -> None:
    """Take the steps of a text that is about to be made."""
    _budget.get().charge(characters // 8, f"{why}, a text of {characters:,} characters,")


def _width(value: Any, why: str) -> int:
    if isinstance(value, int) and abs(value) > WIDTH:
        raise TemplateLimitError(f"{why} of {shown(value)} is above the limit of {WIDTH}")
    return abs(value) if isinstance(value, int) else 0


def shown(number: int) -> str:
    return str(number) if number.bit_length() < 128 else f"{number.bit_length()} bits"


def _replaced(text: str, old: Any, new: Any, *_: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        _make(len(text) + text.count(old) * len(new), "replace")


def _percent(text: str, values: Any) -> None:
    """Measure `text % values`."""
    found = _FORMAT.findall(text)
    for width in (part for parts in found for part in parts):
        if width == "*":
            raise TemplateLimitError("a width of * in a format is not offered")
        if width and (len(width) > 9 or int(width) > WIDTH):
            raise TemplateLimitError(f"a width of {width[:20]} is above the limit of {WIDTH}")
    widths = sum(int(part) for parts in found for part in parts if part)
    _make(len(text) + widths + len(found) * (400 + 8 * _budget.get().size(values)), "a format")


def _braces(text: str, values: Any) -> None:
    """Measure `text.format(values)`."""
    fields = [field for field in string.Formatter().parse(text) if field[1] is not None]
    widths = 0
    for _, _, form, _ in fields:
        if form and "{" in form:
            raise TemplateLimitError("a width of {} in a format is not offered")
        for width in re.findall(r"\d+", form or ""):
            if len(width) > 9 or int(width) > WIDTH:
                raise TemplateLimitError(f"a width of {width[:20]} is above the limit of {WIDTH}")
            widths += int(width)
    _make(len(text) + widths + len(fields) * (400 + 8 * _budget.get().size(values)), "a format")


class _Counting(NodeTransformer):
    """Puts the counters into a template."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        node = self._counted(node)
        node.iter = _call("walked", node.iter)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._counted(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._counted(node)

    def _counted(self, node: Any) -> Any:
        inside = list(node.find_all(nodes.Node))
        text = sum(len(found.data) for found in inside if isinstance(found, nodes.TemplateData))
        steps = nodes.Const(1 + len(inside) // 8 + text // 32)
        node = self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("tick", steps), lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("joined", *node.nodes)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        sides = [node, *node.ops]
        equal = all(operand.op in ("eq", "ne") for operand in node.ops)
        if not (equal and any(isinstance(side.expr, nodes.Const) for side in sides)):
            for side in sides:
                side.expr = _call("seen", side.expr)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = _call("seen", node.key)
        return node


def _call(name: str, *args: Any) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` around answers: a mark for training that renders as its content."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class LimitedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja with the conventions of Hugging Face's chat templates, and the limits of this module.

    What it compiles and renders must be inside of `limited`.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
            finalize=_printed,
        )
        self.tick, self.seen, self.walked, self.joined = _OWN
        self.filters["tojson"] = to_json
        self.filters = {
            name: _measured_filter(name, made)
            for name, made in self.filters.items()
            if name not in _GONE
        }
        self.tests |= {name: _measured_test(name, self.tests[name]) for name in _COMPARING}
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _refuse

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > LONGEST_TEMPLATE:
            raise TemplateLimitError(
                f"it has {len(source):,} characters, more than {LONGEST_TEMPLATE:,}"
            )
        found = _Counting().visit(super()._parse(source, name, filename))
        found.set_environment(self)
        return found

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in UNSAFE and super().is_safe_attribute(obj, attr, value)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if not isinstance(argument, str | int | slice):
            seen(argument)
        found = super().getitem(obj, argument)
        return walked(found) if isinstance(argument, slice) else found

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "%" and isinstance(left, str):
            _percent(left, right)
        elif operator == "**" and numbers:
            _check_bits(left.bit_length() * abs(right), f"{shown(left)}**{shown(right)}")
        elif operator == "*" and numbers:
            _check_bits(left.bit_length() + right.bit_length(), f"{shown(left)}*{shown(right)}")
        elif operator == "*":
            whole, times = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(times, int):
                items = len(whole) if isinstance(whole, str | bytes | list | tuple) else 0
                share = 8 if isinstance(whole, str | bytes) else 1
                steps = items * max(times, 0) // share
                _budget.get().charge(steps, f"the operator * by {shown(times)}")
        elif operator == "+":
            _budget.get().charge(top(left) + top(right), "the operator +")
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def measured(*args: Any, **kwargs: Any) -> str:
            _braces(value.__self__, (args, kwargs))
            return wrapped(*args, **kwargs)

        return measured

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        if any(__obj is own for own in _OWN):
            return __obj(*args)
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "a macro")
        why, budget = f"the call of {name}"[:60], _budget.get()
        if isinstance(owner, str | bytes | list | tuple | dict):
            args = tuple(list(arg) if name == "join" else arg for arg in args)
            budget.charge(top(owner) + sum(budget.size(arg) for arg in args), why)
            if name in _PADS:
                _width(args[0] if args else 0, name)
            if isinstance(owner, str) and name == "replace":
                _replaced(owner, *args)
            if isinstance(owner, str | bytes) and name == "join":
                _make(len(owner) * len(args[0]) if args else 0, "join")
        found = super().call(__context, __obj, *args, **kwargs)
        budget.charge(8 + top(found), why)
        return found


def _check_bits(bits: int, text: str) -> None:
    if bits > BITS:
        raise TemplateLimitError(f"{text} is an integer of more than {BITS} bits")


def _measured_filter(name: str, made: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, which takes its steps; large results are measured before they are made."""
    passed = hasattr(made, "jinja_pass_arg")  # a context, or the like, comes first

    @functools.wraps(made)
    def measured(*args: Any, **kwargs: Any) -> Any:
        given = list(args[1:] if passed else args)
        value, options = given[0] if given else None, [*given[1:], *kwargs.values()]
        budget, why = _budget.get(), f"the filter {name}"
        if name == "join":
            value = given[0] = list(walked(value or ()))
            args = (*args[:1], *given) if passed else tuple(given)
        size = top if name in _SHALLOW else budget.size
        budget.charge(size(value) + sum(map(top, options)), why)
        if name in _SIZED:
            budget.charge(sum(_width(option, why) for option in options), why)
        if name == "indent":
            longest = max([4, *map(_length, options)])
            _make(str(value).count("\n") * longest, why)
        elif name == "join":
            _make(len(given[0]) * max(map(_length, options), default=0), why)
        elif name == "replace":
            _replaced(str(value), *given[1:], **kwargs)
        elif name == "format":
            _percent(str(value), (given[1:], kwargs))
        elif name == "sum" and any(not isinstance(x, int | float | str) for x in options):
            raise TemplateLimitError("the filter sum adds numbers alone")
        found = made(*args, **kwargs)
        budget.charge(top(found), why)
        return found

    return measured


def _length(option: Any) -> int:
    return option if isinstance(option, int) else len(option) if isinstance(option, str) else 0


def _measured_test(name: str, made: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(made)
    def measured(*args: Any, **kwargs: Any) -> Any:
        for value in args:
            seen(value)
        return made(*args, **kwargs)

    return measured


def to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, **options: Any) -> str:
    """As Hugging Face's: Jinja's own would escape for HTML."""
    if indent is None:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)
    width = _width(indent, "the filter tojson with an indent") + _length(indent)
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, **options)
    parts = []
    for part in encoder.iterencode(value):
        _make(len(part) + 8 * (width > 64), "the filter tojson")
        parts.append(part)
    return "".join(parts)


def _refuse(message: str) -> None:
    raise ValueError(str(message)[:300])
