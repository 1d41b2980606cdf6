"""Linear layers of any Flax NNX module: list them, add adapters, merge adapters."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from memgen.checks import check_by_name, check_module, wrong_matrices
from memgen.placement import placed_as

LAYERS = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum)
OWN_CALLS = tuple(kind.__call__ for kind in LAYERS)

LayerAxes = tuple[tuple[str | None, ...], str | None, str | None]
"""Axis names of a linear layer: names of stacked axes, name of the inputs, name of the outputs."""


class _Form(NamedTuple):
    """How to reshape a layer's kernel to a matrix, and the layer's input and output to vectors.

    Attributes:
        stack: Sizes of the leading axes that `nnx.vmap` or `nnx.scan` added to the kernel.
        inputs: Sizes of the kernel's contracted axes, in the kernel's order.
        outputs: Sizes of the kernel's output axes, in the kernel's order.
        kernel: Indices of the kernel's axes after the stack: contracted axes first, then output
            axes.
        before: Einsum equation of the input that moves its contracted axes to the end, or None.
        after: Einsum equation from `[..., *outputs]` to the layer's output, or None.
        axis: Contracted axes of the input, used if `before` is None.
    """

    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    kernel: tuple[int, ...]
    before: str | None = None
    after: str | None = None
    axis: tuple[int, ...] = (-1,)

    @property
    def target(self) -> tuple[tuple[int, ...], int, int]:
        return self.stack, math.prod(self.inputs), math.prod(self.outputs)

    def rows(self, x: jax.Array) -> jax.Array:
        """Reshape the layer's input to vectors `[..., inputs]`."""
        last = range(-len(self.inputs), 0)
        x = jnp.einsum(self.before, x) if self.before else jnp.moveaxis(x, self.axis, last)
        return _joined(x, len(self.inputs))

    def of_rows(self, y: jax.Array) -> jax.Array:
        """Reshape vectors `[..., outputs]` to the layer's output."""
        y = y.reshape(*y.shape[:-1], *self.outputs)
        return jnp.einsum(self.after, y) if self.after else y

    def of_matrix(self, delta: jax.Array) -> jax.Array:
        """Reshape a matrix `[*stack, inputs, outputs]` to the layer's kernel."""
        delta = _whole(delta, 2).reshape(*self.stack, *self.inputs, *self.outputs)
        depth = len(self.stack)
        back = sorted(range(len(self.kernel)), key=self.kernel.__getitem__)
        return delta.transpose(*range(depth), *(depth + axis for axis in back))


def linear_layers(module: nnx.Module) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """List a module's linear layers, in the form of `DecoderBackbone.lora_targets`.

    Linear layers are instances of `nnx.Linear`, `nnx.LinearGeneral` and `nnx.Einsum` (or of
    subclasses), and modules whose class name ends in `Linear` and that have a
    `kernel [inputs, outputs]`. `nnx.vmap` or `nnx.scan` may have stacked layers on leading axes.
    Layers with one matrix per element of a batch axis are left out, and so are `nnx.Einsum` layers
    whose equation is passed to the call or is not a single matrix product.

    Args:
        module: Module of any kind, or a pytree of modules.

    Returns:
        Dict from a layer's path to `(stack, inputs, outputs)`: the sizes of its stacked axes (`()`
        for a single layer), its number of inputs, and its number of outputs.

    Raises:
        ValueError: `module` holds no `nnx.Module`, or a kernel is stacked on other than its first
            axes.
    """
    check_module(module)
    return {name: form.target for name, _, form in _layers(module)}


def linear_axes(module: nnx.Module, targets: Iterable[str]) -> dict[str, LayerAxes]:
    """Return the axis names of the kernels of a module's linear layers.

    If inputs or outputs consist of several axes, the name of the first axis stands for all of them.

    Args:
        module: Module of any kind.
        targets: Paths of the layers to list.

    Returns:
        Dict from a layer's path to the layer's axis names. Targets that are not the path of a
        linear layer, and layers without axis names, are left out.
    """
    found, targets = {}, set(targets)
    for name, layer in _named_layers(module):
        given: Any = layer.kernel.get_metadata().get("out_sharding") if name in targets else None
        form = _form_of(name, layer) if given else None
        if form is None:
            continue
        names = tuple(getattr(given, "spec", given))
        own = len(form.kernel)
        if len(names) == own:  # a stack whose transformation names no axis
            names = (None,) * len(form.stack) + names
        above, names = names[: len(form.stack)], names[len(form.stack) :]
        names += (None,) * (own - len(names))
        found[name] = above, names[form.kernel[0]], names[form.kernel[len(form.inputs)]]
    return found


def apply_lora(module: nnx.Module, adapter: Mapping[str, Any]) -> Any:
    """Return a copy of a module with adapters on its linear layers; all arrays are shared.

    NNX modules implement `DecoderBackbone.apply_lora` by this function. An adapted layer is an
    instance of a subclass of the layer's class, and keeps the layer's attributes (`kernel`,
    `out_features`, ...) and call arguments (`out_sharding`). The adapter's output is added to the
    layer's output. If the layer's class overrides `__call__`, which may scale the output, the
    adapter's matrix is added to the kernel during the call instead. Either way the result is the
    same as after `merge_lora`.

    Args:
        module: Module with linear layers.
        adapter: Mapping from the path of a linear layer (see `linear_layers`) to its adapter, a
            linear callable from `[..., inputs]` to `[..., outputs]`.

    Raises:
        ValueError: A path does not lead to a linear layer, an adapter does not have its layer's
            shape, or a layer has an adapter already.
    """

    def change(name: str, layer: Any, form: _Form) -> Any:
        low = adapter[name]
        if shape := wrong_matrices(low, form.target):
            _check_shape(name, "an adapter", shape, form)
        adapted: Any = object.__new__(_with_adapter(type(layer)))
        vars(adapted).update(vars(_copy(layer)))
        adapted.low_rank = nnx.data(low)
        return adapted

    check_by_name("adapter", adapter)
    return _changed(module, adapter, change)


def merge_lora(module: nnx.Module, deltas: Mapping[str, jax.Array]) -> Any:
    """Return a copy of a module with adapters merged into the kernels of its linear layers.

    Args:
        module: Module with linear layers.
        deltas: Mapping from the path of a linear layer to the matrix to add to its kernel,
            `[*stack, inputs, outputs]` (`LowRank.delta`).

    Raises:
        ValueError: A path does not lead to a linear layer, a delta does not have its layer's shape,
            or a layer has an adapter already.
    """

    def change(name: str, layer: Any, form: _Form) -> Any:
        _check_shape(name, "a delta", deltas[name].shape, form)
        copy = _copy(layer)
        kernel = copy.kernel[...]
        copy.kernel.set_value(_changed_kernel(kernel, deltas[name], form))
        return copy

    check_by_name("deltas", deltas)
    return _changed(module, deltas, change)


def _check_shape(name: str, what: str, shape: tuple[int, ...], form: _Form) -> None:
    stack, *matrix = form.target
    if shape != (*stack, *matrix):
        raise ValueError(
            f"{name}: {what} of shape {shape} for a layer of {(*stack, *matrix)}: give that of "
            "this module"
        )


def choices(names: Mapping[str, Any]) -> str:
    """List layer names for an error message, with `*` for indices and without duplicates."""
    short = (
        "/".join("*" if part.isdigit() else part for part in name.split("/")) for name in names
    )
    return ", ".join(dict.fromkeys(short))


def _layers(module: Any) -> Iterator[tuple[str, Any, _Form]]:
    for name, layer in _named_layers(module):
        if (form := _form_of(name, layer)) is not None:
            yield name, layer, form


def _named_layers(module: Any) -> Iterator[tuple[str, Any]]:
    found, _ = jax.tree_util.tree_flatten_with_path(module, is_leaf=_is_layer)
    return ((_name(path), layer) for path, layer in found if _is_layer(layer))


def _changed(module: Any, changes: Mapping[str, Any], change: Any) -> Any:
    check_module(module)
    known = {name: (layer, form) for name, layer, form in _layers(module)}
    for name in changes:
        if name not in known:
            there = choices(known) or "a module that has some; this one has none"
            raise ValueError(f"no linear layer {name!r}: choose from {there}")
        if hasattr(known[name][0], "low_rank"):
            raise ValueError(f"{name} has an adapter already: merge it first (merge_lora)")
    # Flattening and unflattening copies all objects: the copy shares only arrays with the module.
    found, structure = jax.tree_util.tree_flatten_with_path(module, is_leaf=_is_layer)
    parts = [
        change(name, *known[name]) if (name := _name(path)) in changes else _copy(part)
        for path, part in found
    ]
    return jax.tree.unflatten(structure, parts)


def _copy(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, leaves)


def _is_layer(part: Any) -> bool:
    if isinstance(part, LAYERS):
        return True
    named = isinstance(part, nnx.Module) and type(part).__name__.endswith("Linear")
    return named and isinstance(getattr(part, "kernel", None), nnx.Variable)


def _name(path: tuple[Any, ...]) -> str:
    keys = (getattr(key, "name", getattr(key, "idx", getattr(key, "key", key))) for key in path)
    return "/".join(map(str, keys))


class _Adapted:
    """Base class of linear layers whose adapter `low_rank` is added to their output."""

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        layer: Any = self
        form = _form_of("a layer", layer)
        assert form is not None  # only layers with a form get an adapter
        if form.stack:
            raise ValueError(
                f"a kernel of shape {layer.kernel.shape} is a stack of {form.target[1:]} matrices: "
                "call the layer inside the nnx.vmap or nnx.scan that it was made by; layers with "
                "a matrix for each element of a batch take no adapter"
            )
        kind = type(self).__mro__[2]
        if kind.__call__ not in OWN_CALLS:
            return kind.__call__(_with_changed_kernel(layer, kind, form), *args, **kwargs)
        y = super().__call__(*args, **kwargs)  # pyright: ignore
        bound = inspect.signature(super().__call__).bind(*args, **kwargs)  # pyright: ignore
        inputs = next(iter(bound.arguments.values()))
        # The adapter computes in the dtype of the layer's output.
        update = form.of_rows(layer.low_rank(form.rows(inputs).astype(y.dtype)))
        return y + placed_as(update.astype(y.dtype), y)

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = super().__reduce_ex__(max(2, int(protocol)))
        return _empty, (type(self).__mro__[2],), *state


def _with_changed_kernel(layer: Any, kind: type, form: _Form) -> Any:
    """Return a copy of an adapted layer with the adapter merged into its kernel.

    This is for layers whose class overrides `__call__`. An overriding `__call__` may scale the
    result or normalise the kernel, so adding the adapter's output to the result would be wrong.
    """
    low = layer.low_rank
    if not hasattr(low, "delta"):
        raise ValueError(
            f"{kind.__name__} has a __call__ of its own, which takes an adapter by its kernel: "
            f"give one with a delta, as of make_adapter, not a {type(low).__name__}"
        )
    if getattr(low, "key", None) is not None and low.dropout:
        raise ValueError(
            f"{kind.__name__} has a __call__ of its own, whose input no dropout={low.dropout} "
            "reaches: set dropout=0, or leave it out of the targets"
        )
    changed = object.__new__(type(layer))
    kernel = _changed_kernel(layer.kernel[...], low.delta, form)
    vars(changed).update(vars(layer) | {"kernel": layer.kernel.replace(kernel)})
    return changed


def _changed_kernel(kernel: jax.Array, delta: jax.Array, form: _Form) -> jax.Array:
    return kernel + placed_as(form.of_matrix(delta).astype(kernel.dtype), kernel)


def _empty(kind: type) -> Any:
    return object.__new__(_with_adapter(kind))


@functools.cache
def _with_adapter(kind: type) -> type:
    return type(f"Adapted{kind.__name__}", (_Adapted, kind), {})


def _form_of(name: str, layer: Any) -> _Form | None:
    """Return the form of a layer, or None if the layer is not a single matrix product."""
    if isinstance(layer, nnx.Einsum):
        return None if layer.einsum_str is None else _einsum_form(name, layer)
    if isinstance(layer, nnx.LinearGeneral):
        if layer.batch_axis:
            return None
        inputs, outputs = tuple(layer.in_features), tuple(layer.out_features)
        order, axis = tuple(range(len(inputs) + len(outputs))), tuple(layer.axis)
        return _Form(_stack(name, layer, (*inputs, *outputs)), inputs, outputs, order, axis=axis)
    if layer.kernel.ndim < 2:
        return None
    inputs, outputs = layer.kernel.shape[-2:]
    if isinstance(layer, nnx.Linear):
        inputs, outputs = layer.in_features, layer.out_features
    return _Form(_stack(name, layer, (inputs, outputs)), (inputs,), (outputs,), (0, 1))


def _einsum_form(name: str, layer: nnx.Einsum) -> _Form | None:
    given, _, result = layer.einsum_str.replace(" ", "").partition("->")
    given, _, kernel = given.partition(",")
    contracted = [axis for axis in kernel if axis in given]
    kept = [axis for axis in kernel if axis not in given]
    rest = "".join(axis for axis in given if axis not in contracted)
    # A single matrix product: no axis of the kernel is a batch axis, summed over or repeated.
    plain = sorted(rest + "".join(kept)) == sorted(result) and len(set(kernel)) == len(kernel)
    if not plain or not contracted or not kept or "." in kernel:
        return None
    order = tuple(map(kernel.index, (*contracted, *kept)))
    sizes = [layer.kernel_shape[axis] for axis in order]
    return _Form(
        _stack(name, layer, tuple(layer.kernel_shape)),
        tuple(sizes[: len(contracted)]),
        tuple(sizes[len(contracted) :]),
        order,
        before=f"{given}->{rest}{''.join(contracted)}",
        after=f"{rest}{''.join(kept)}->{result}",
    )


def _stack(name: str, layer: Any, own: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sizes of a kernel's stacked axes, which precede the axes `own` of one layer."""
    shape = tuple(layer.kernel.shape)
    if shape[max(0, len(shape) - len(own)) :] != own:
        raise ValueError(
            f"{name} has a kernel of shape {shape}, its sizes are {own}: "
            "stack layers on the first axis of their kernels"
        )
    return shape[: len(shape) - len(own)]


def _joined(x: jax.Array, axes: int) -> jax.Array:
    """Merge the last `axes` axes of `x` into one axis, with the sharding of the first of them.

    Explicit sharding of the other merged axes is gathered, since the merged axis can't keep it.
    """
    x = _whole(x, axes - 1)
    rows, here = x.ndim - axes, jax.typeof(x).sharding
    shape = (*x.shape[:rows], math.prod(x.shape[rows:]))
    if not any(here.spec):
        return x.reshape(shape)
    place = NamedSharding(here.mesh, PartitionSpec(*here.spec[: rows + 1]))
    return jax.lax.reshape(x, shape, out_sharding=place)


def _whole(x: jax.Array, axes: int) -> jax.Array:
    """Gather `x` over its last `axes` axes, if they are explicitly sharded."""
    here = jax.typeof(x).sharding
    if not any(here.spec[x.ndim - axes :]):
        return x
    spec = PartitionSpec(*here.spec[: x.ndim - axes], *[None] * axes)
    return jax.sharding.reshard(x, NamedSharding(here.mesh, spec))
