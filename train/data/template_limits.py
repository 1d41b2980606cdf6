"""Sandbox of chat templates: no access to Python's internals, and limits on work and memory.

A template comes with a model, so anybody may have written it. Jinja's sandbox only blocks Python's
internals: it would still run `'%999999999d' % 1`, which takes 7 GB, and `9**(9**9)`, which never
ends. Here each loop, call, filter, operator and output uses up a budget that grows with the
conversation (`template_budget`), and large results are measured before they are made. The limits
are counts, so that a template fails on every machine or on none. A limit of 20 s of CPU time stops
work that the counts miss.
"""

import functools
import json
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from train.data.template_budget import (
    TemplateLimitError,
    budget,
    check_bits,
    copy,
    limited,
    make,
    measure_braces,
    measure_percent,
    measure_replace,
    shown,
    top,
    width_of,
)

__all__ = ["LONGEST_TEMPLATE", "LimitedEnvironment", "TemplateLimitError", "limited"]

LONGEST_TEMPLATE = 200_000

UNSAFE = {"translate", "maketrans", "expandtabs", "encode", "to_bytes", "from_bytes", "mapping"}
_PADS = {"center", "ljust", "rjust", "zfill"}
# Methods that may go through their argument once for each character of the text.
_SEARCHES = {"strip", "lstrip", "rstrip", "trim", "rfind", "rindex", "rsplit", "rpartition"}
# Filters that look only at the top level of a value, not at nested values.
_SHALLOW = {
    "length", "count", "first", "last", "list", "map", "select", "selectattr", "reject",
    "rejectattr", "reverse", "items", "default", "d", "attr", "batch", "slice",
}  # fmt: skip
_SIZED = {"center", "indent", "batch", "slice", "truncate", "round"}
_GONE = {"wordwrap", "urlize", "pprint"}  # for web pages, or repeats work at each level
_COMPARING = {
    "eq", "equalto", "==", "ne", "!=", "lt", "lessthan", "<", "le", "<=", "gt", "greaterthan", ">",
    "ge", ">=", "in", "lower", "upper", "filter", "test", "odd", "even", "divisibleby",
}  # fmt: skip
_DIVIDING = {"odd", "even", "divisibleby"}  # by %, which formats a text


def tick(steps: int) -> None:
    """Charge the budget for one iteration of a loop or one call of a macro."""
    budget().charge(steps, "a loop")


def seen(value: Any) -> Any:
    """Charge the budget for a value that is compared or looked up, and return the value."""
    spent = budget()
    spent.charge(spent.size(value), "a comparison")
    return value


def walked(value: Any) -> Any:
    """Charge the budget for the items of a loop, including items that a condition skips.

    Returns:
        The value, unchanged.
    """
    budget().charge(top(value), "a loop")
    return value


def joined(*values: Any) -> str:
    """Compute `a ~ b`: join values as text, and charge the budget for it."""
    why = "the operator ~"
    copy((value for value in values if isinstance(value, str)), why)
    return _kept(
        "".join(value if isinstance(value, str) else str(_printed(value, why)) for value in values),
        why,
    )


def added(*values: Any) -> Any:
    """Compute `a + b + c` and charge the budget for it; texts are joined in one copy."""
    if all(type(value) is str for value in values):
        copy(values, "the operator +")
        return _kept("".join(values), "the operator +")
    return functools.reduce(_plus, values)


def _plus(left: Any, right: Any) -> Any:
    kinds = type(left), type(right)
    if all(issubclass(kind, int) for kind in kinds):
        _check_numbers("+", left, right)
    elif all(issubclass(kind, str) for kind in kinds):
        copy((left, right), "the operator +")
        return _kept(left + right, "the operator +")
    else:
        budget().charge(top(left) + top(right), "the operator +")
    return left + right


def _kept(text: str, why: str) -> str:
    budget().keep(text, why)
    return text


def _check_numbers(operator: str, left: int, right: int) -> None:
    """Refuse an operation whose integer result would have too many bits."""
    one, other = left.bit_length(), right.bit_length()
    bits = {"**": one * abs(right), "*": one + other}.get(operator, max(one, other))
    check_bits(bits, f"{shown(left)}{operator}{shown(right)}")


def _printed(value: Any, why: str = "the output") -> Any:
    spent = budget()
    spent.charge(spent.size(value), why)
    return value


_OWN: tuple[Callable[..., Any], ...] = (tick, seen, walked, joined, added)


class _Counting(NodeTransformer):
    """Visitor that inserts the calls that charge the budget into a template."""

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

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        operands, left = [node.right], node.left
        while isinstance(left, nodes.Add):
            operands.append(left.right)
            left = left.left
        return _call("added", *map(self.visit, [left, *reversed(operands)]))

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        if isinstance(node.value, int):
            check_bits(node.value.bit_length(), shown(node.value))
        return node

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
    """Tag `{% generation %}` around answers, a training mark; only its content is rendered."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class LimitedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Sandboxed Jinja environment for Hugging Face chat templates, with this module's limits.

    Templates must be compiled and rendered inside the context manager `limited`, which sets the
    budget.
    """

    intercepted_binops = frozenset({"-", "*", "**", "//", "%"})

    def __init__(self):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
            finalize=_printed,
        )
        self.tick, self.seen, self.walked, self.joined, self.added = _OWN
        self.filters["tojson"] = to_json
        self.filters = {
            name: _measured_filter(name, made)
            for name, made in self.filters.items()
            if name not in _GONE
        }
        self.tests |= {name: _measured_test(name, self.tests[name]) for name in _COMPARING}
        del self.globals["lipsum"]
        self.globals["raise_exception"] = raise_exception

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
        if isinstance(left, int) and isinstance(right, int):
            _check_numbers(operator, left, right)
        elif operator == "%" and isinstance(left, str):
            measure_percent(left, right)
        elif operator == "*":
            whole, times = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(times, int):
                items = len(whole) if isinstance(whole, str | list | tuple) else 0
                steps = items * max(times, 0) // (8 if isinstance(whole, str) else 1)
                budget().charge(steps, f"the operator * by {shown(times)}")
        elif operator == "-":  # of keys and items of objects too
            budget().charge(budget().size(left) + budget().size(right), "the operator -")
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        @functools.wraps(wrapped)
        def measured(*args: Any, **kwargs: Any) -> str:
            measure_braces(value.__self__, (args, kwargs))
            return wrapped(*args, **kwargs)

        return measured

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        if any(__obj is own for own in _OWN):
            return __obj(*args)
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "a macro")
        why, spent = f"the call of {name}"[:60], budget()
        if isinstance(owner, str) and name == "join":
            args = tuple(map(list, args))
        if not isinstance(__obj, Macro | LoopContext):  # those look at none of their arguments
            options = () if __obj is dict or __obj is Namespace else kwargs.values()
            spent.charge(top(owner) + sum(map(spent.size, (*args, *options))), why)
        if isinstance(owner, str):
            _measure_method(owner, name, args, kwargs)
        found = super().call(__context, __obj, *args, **kwargs)
        spent.charge(8 + top(found), why)
        return found


def _measure_method(text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Charge the budget for `text.name(...)` before it is computed."""
    if name in _PADS:
        width_of(args[0] if args else 0, name)
    elif name == "replace":
        measure_replace(text, *args, **kwargs)
    elif name == "join":
        make(len(text) * len(args[0]) if args else 0, "join")
    elif name in _SEARCHES:
        _measure_search(text, (*args, *kwargs.values()), f"the call of {name}")


def _measure_search(text: str, options: Iterable[Any], why: str) -> None:
    sought = sum(len(option) for option in options if isinstance(option, str))
    budget().charge(top(text) * (sought // 16), why)


def _measured_filter(name: str, made: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter so that it charges the budget, before a large result is made."""
    passed = hasattr(made, "jinja_pass_arg")  # a context, or the like, comes first

    @functools.wraps(made)
    def measured(*args: Any, **kwargs: Any) -> Any:
        given = list(args[1:] if passed else args)
        value, options = given[0] if given else None, [*given[1:], *kwargs.values()]
        spent, why = budget(), f"the filter {name}"
        if name == "join":
            value = given[0] = list(walked(value or ()))
            args = (*args[:1], *given) if passed else tuple(given)
        size = top if name in _SHALLOW else spent.size
        deep = top if name in ("default", "d") else spent.size  # a name is hashed, whatever it is
        spent.charge(size(value) + sum(map(deep, options)), why)
        if name in _SIZED:
            spent.charge(sum(width_of(option, why) for option in options), why)
        if name == "indent":
            longest = max([4, *map(_length, options)])
            make(len(str(value).splitlines()) * longest, why)
        elif name == "join":
            make(len(given[0]) * max(map(_length, options), default=0), why)
        elif name == "replace":
            measure_replace(str(value), *given[1:], **kwargs)
        elif name == "format":
            measure_percent(str(value), (given[1:], kwargs))
        elif name in _SEARCHES:
            _measure_search(str(value), options, why)
        elif name == "round" and not isinstance(value, int | float):
            raise TemplateLimitError("the filter round takes numbers alone")
        elif name == "sum" and any(not isinstance(x, int | float | str) for x in options):
            raise TemplateLimitError("the filter sum adds numbers alone")
        found = made(*args, **kwargs)
        if name in ("int", "sum") and isinstance(found, int):
            check_bits(found.bit_length(), f"what {why} makes")
        spent.charge(top(found), why)
        return found

    return measured


def _length(option: Any) -> int:
    return option if isinstance(option, int) else len(option) if isinstance(option, str) else 0


def _measured_test(name: str, made: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(made)
    def measured(*args: Any, **kwargs: Any) -> Any:
        for value in args:
            seen(value)
        if name in _DIVIDING and isinstance(args[0], str):
            measure_percent(args[0], args[1:])
        return made(*args, **kwargs)

    return measured


def to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, **options: Any) -> str:
    """Write a value as JSON, as Hugging Face's filter does; Jinja's own would escape for HTML."""
    if indent is None and not options:
        return json.dumps(value, ensure_ascii=ensure_ascii)
    width = width_of(indent, "the filter tojson with an indent") + _length(indent)
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, **options)
    parts = []
    for part in encoder.iterencode(value):
        make(len(part) + 8 * (width > 64), "the filter tojson")
        parts.append(part)
    return "".join(parts)


def raise_exception(message: str) -> None:
    raise ValueError(str(message)[:300])
