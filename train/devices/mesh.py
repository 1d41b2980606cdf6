"""Device mesh and shardings of a run, with one API for a laptop and a pod."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH_AXES = ("data", "fsdp")


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """Names of the mesh axes that split the batch: `data` and `fsdp`, if the mesh has them."""
    return tuple(name for name in BATCH_AXES if name in mesh.shape)


def is_explicit(mesh: Mesh) -> bool:
    """Whether a mesh has `AxisType.Explicit` axes, whose shardings are part of array types."""
    return AxisType.Explicit in mesh.axis_types


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis; one number may be -1, for all remaining devices.

    Attributes:
        data: Number of devices along the axis that splits the batch and replicates parameters.
        fsdp: Number of devices along the axis that splits both the batch and the parameters.
        tensor: Number of devices along the axis that splits heads, MLP width and vocabulary.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """Mesh axis that splits each logical axis of parameters; None leaves the logical axis whole.

    Each parameter names its logical axes in its metadata `axes`.
    """

    layers: str | None = None
    vocab: str | None = "tensor"
    embed: str | None = "fsdp"
    heads: str | None = "tensor"
    kv_heads: str | None = "tensor"
    head_dim: str | None = None
    mlp: str | None = "tensor"
    candidates: str | None = None


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Make a `data x fsdp x tensor` mesh; a single device gives a 1x1x1 mesh.

    Args:
        config: Number of devices along each axis.
        devices: Devices of the mesh. None returns the mesh of a surrounding `jax.set_mesh`,
            whatever its axis types, or makes a mesh of all devices if no mesh is set.

    Raises:
        ValueError: The product of the sizes is not the number of devices, or `config` is not the
            default inside `jax.set_mesh`.
    """
    if devices is None and not (around := jax.sharding.get_mesh()).empty:
        if config != MeshConfig():
            raise ValueError(
                f"mesh {_sizes(dataclasses.asdict(config))} inside jax.set_mesh of "
                f"{_sizes(around.shape)}: leave one of the two out"
            )
        return around
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(config)
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) == 1 and fixed >= 1 and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"mesh {_sizes(sizes)} does not fit {len(devices)} devices: "
            f"choose sizes whose product is {len(devices)}, one of them may be -1"
        )
    auto, shape = (AxisType.Auto,) * len(sizes), tuple(sizes.values())
    try:
        return jax.make_mesh(shape, tuple(sizes), axis_types=auto, devices=devices)
    except NotImplementedError:  # an axis along a part of a dimension of the torus
        split = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(split, tuple(sizes), axis_types=auto)


def check_mesh(mesh: Mesh) -> None:
    """Raise a ValueError for a mesh that the trainer can't shard a run over.

    The axes must be named `data`, `fsdp` or `tensor`, must include `data` or `fsdp`, and must be
    all `AxisType.Auto` or all `AxisType.Explicit`. Explicit axes `fsdp` and `tensor` must have size
    1.

    Args:
        mesh: Mesh of the run, made by `make_mesh` or by a user.
    """
    if not batch_axes(mesh) or not set(mesh.shape) <= {*BATCH_AXES, "tensor"}:
        raise ValueError(
            f"mesh {_sizes(mesh.shape)} has axes that the trainer does not know: name them data, "
            "fsdp (both split the batch) and tensor"
        )
    if len(set(mesh.axis_types)) > 1:
        raise ValueError(
            f"mesh {_sizes(mesh.shape)} has axes of the kinds "
            f"{', '.join(map(str, mesh.axis_types))}: make all of them auto or all explicit"
        )
    parameters = {name: mesh.shape[name] for name in ("fsdp", "tensor") if name in mesh.shape}
    if is_explicit(mesh) and max(parameters.values(), default=1) > 1:
        raise ValueError(
            f"mesh {_sizes(mesh.shape)} is explicit, and under explicit axes parameters are not "
            f"split: leave {_sizes(parameters)} to auto axes, or split the batch over data alone"
        )


def check_entered(mesh: Mesh) -> None:
    """Raise a ValueError for a mesh with explicit axes outside of `jax.set_mesh(mesh)`.

    Args:
        mesh: Mesh of the run.
    """
    around = jax.sharding.get_abstract_mesh()
    if is_explicit(mesh) and around != mesh.abstract_mesh:
        raise ValueError(
            f"mesh {_sizes(mesh.shape)} is explicit and the mesh around is "
            f"{_sizes(around.shape) or 'none'}: call inside jax.set_mesh(mesh)"
        )


def check_auto(mesh: Mesh, who: str) -> None:
    """Raise a ValueError for a mesh with explicit axes.

    Args:
        mesh: Mesh of the run.
        who: Name of the work that needs auto axes, such as "fine-tuning".
    """
    if is_explicit(mesh):
        raise ValueError(
            f"mesh {_sizes(mesh.shape)} is explicit, {who} needs auto axes: give jax.make_mesh "
            f"axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.shape)}"
        )


def _sizes(shape: Mapping[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in shape.items())


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding that replicates an array on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding that splits the leading axis of an array over `data` and `fsdp`."""
    return NamedSharding(mesh, P(batch_axes(mesh)))


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raise a ValueError unless a batch divides into microbatches that divide over the mesh.

    Args:
        batch_size: Number of rows per batch over all devices.
        accumulate: Number of microbatches per batch.
        mesh: Mesh of the run.
    """
    shards = math.prod(mesh.shape[name] for name in batch_axes(mesh))
    if batch_size < 1 or accumulate < 1 or batch_size % (accumulate * shards):
        raise ValueError(
            f"batch_size={batch_size} does not divide into accumulate={accumulate} parts over "
            f"data x fsdp = {shards} devices: choose a multiple of {accumulate * shards}"
        )


def state_shardings(state: Any, mesh: Mesh, rules: AxisRules = AxisRules()) -> Any:  # noqa: B008
    """Choose the sharding of each leaf of a tree by the `axes` metadata of its Flax Variables.

    Leaves without this metadata are replicated.

    Args:
        state: Tree with Flax Variables, abstract or real, such as parameters or optimizer state,
            whose moments keep the metadata of their parameters.
        mesh: Mesh of the run.
        rules: Mesh axis that splits each logical axis of parameters.

    Returns:
        Tree like `state` with a `NamedSharding` for each leaf.

    Raises:
        ValueError: The size of a parameter's axis does not divide over its mesh axis, or a logical
            axis has no rule.
    """

    def of_node(path: Any, node: Any) -> Any:
        if not isinstance(node, nnx.Variable):
            return replicated(mesh)
        axes = node.get_metadata().get("axes")
        return jax.tree.map(lambda leaf: _sharding_of(path, leaf.shape, axes, mesh, rules), node)

    return jax.tree_util.tree_map_with_path(
        of_node, state, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )


def _sharding_of(path, shape, axes, mesh: Mesh, rules: AxisRules) -> NamedSharding:
    if axes is None or len(axes) > len(shape):
        return replicated(mesh)
    axes = ("layers",) * (len(shape) - len(axes)) + axes
    known = dataclasses.asdict(rules)
    if unknown := [name for name in axes if name is not None and name not in known]:
        raise ValueError(
            f"{jax.tree_util.keystr(path)}: no rule for the axis {unknown[0]!r}: choose from "
            f"{', '.join(known)}, or None for an axis that is not split"
        )
    # Explicit axes of one device are left out: products of two operands that have them are refused.
    split = {name for name, size in mesh.shape.items() if size > 1 or not is_explicit(mesh)}
    spec = [known[name] if name and known[name] in split else None for name in axes]
    for size, name, mesh_axis in zip(shape, axes, spec, strict=True):
        if mesh_axis and size % mesh.shape[mesh_axis]:
            raise ValueError(
                f"{jax.tree_util.keystr(path)}: {name}={size} does not divide over "
                f"{mesh_axis}={mesh.shape[mesh_axis]}: choose a mesh size that divides it"
            )
    return NamedSharding(mesh, P(*spec))


def shard_bytes(tree: Any) -> int:
    """Count the bytes that one device holds of a tree of sharded arrays, real or abstract."""
    sizes = [
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    ]
    return sum(sizes)


def constrain_batch(mesh: Mesh):
    """Make a sharding constraint for residuals `[B, S, D]` that splits only the batch.

    Without the constraint XLA may choose to split `D`, which takes several times the memory.

    Returns:
        Function that constrains an array `[B, S, D]`; None for one device, and for explicit axes,
        with which the sharding is part of the array's type.
    """
    if mesh.size == 1 or is_explicit(mesh):
        return None
    sharding = NamedSharding(mesh, P(batch_axes(mesh), None, None))
    return lambda x: jax.lax.with_sharding_constraint(x, sharding)


def place(batch: Any, mesh: Mesh) -> jax.Array:
    """Shard the rows of a NumPy batch `[B, ...]`, which every process has in full, over a mesh."""
    return jax.make_array_from_callback(batch.shape, batch_sharding(mesh), lambda part: batch[part])


def put(tree: Any, shardings: Any) -> Any:
    """Shard a tree of arrays, each of which every process has in full, by a tree of shardings.

    Arrays that already have the wanted sharding are not copied.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def whole(leaf: Any, sharding: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        # device_put of a local array gives one of jax 0.10 whose shards can't be read or saved.
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, lambda part: values[part])

    return jax.tree.map(whole, tree, shardings)


def rows_here(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Find the local rows of a batch: the rows on this process's devices.

    Local rows need not be contiguous: on a TPU slice a process has a block of the torus. Processes
    that differ only along `tensor` have the same rows.

    Returns:
        Indices of the local rows in the batch, in increasing order `[b]`.
    """
    return rows_on(batch_sharding(mesh).addressable_devices, batch_size, mesh)


def rows_on(devices: Iterable[Any], batch_size: int, mesh: Mesh) -> np.ndarray:
    """Find the indices, in increasing order, of a batch's rows on some devices of a mesh `[b]`."""
    slices = batch_sharding(mesh).devices_indices_map((batch_size,))
    every = np.arange(batch_size)
    return np.unique(np.concatenate([every[slices[device]] for device in devices]))


def place_local(part: np.ndarray, rows: np.ndarray, batch_size: int, mesh: Mesh) -> jax.Array:
    """Put this process's local rows of a batch on the mesh.

    Args:
        part: Local rows of the batch `[b, ...]`.
        rows: Indices of the local rows in the batch, in increasing order `[b]` (`rows_here`).
        batch_size: Number of rows of the batch over all processes, B.
        mesh: Mesh of the run.

    Returns:
        The whole batch `[B, ...]`, split over `data` and `fsdp`.
    """

    def shard(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(batch_size)
        first = np.searchsorted(rows, start)
        return part[first : first + stop - start]

    shape = (batch_size, *part.shape[1:])
    return jax.make_array_from_callback(shape, batch_sharding(mesh), shard)
