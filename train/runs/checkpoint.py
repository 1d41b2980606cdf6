"""Checkpoints: asynchronous, strict, readable without a trainer. The only file that imports orbax.

A run folder holds one folder per saved step with three items: `params` and `train`, flat maps from
readable names such as `blocks/attention/q` or `opt/0/mu/embed` to arrays, so that no Flax or Optax
class is needed to read them, and `meta`, JSON: the caller's metadata and the form of every leaf. A
step folder gets its final name only when it is complete.
"""

import contextlib
import errno
import json
import os
import threading
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from train.runs.quiet_orbax import QuietOrbax

_ITEMS = ("params", "train")
_SHOWN = 3  # leaves named in an error line


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or not be read into what was asked for; one line."""


class Checkpointer:
    """Saves and restores the two pytrees of a run; every process of the run calls every method.

    `params` and `train` are any pytrees of jax arrays (typed PRNG keys included); `meta` is a JSON
    object. Saves at multiples of `save_interval` and when the cluster announces a preemption; keeps
    the newest `keep` checkpoints and, for ever, those at multiples of `keep_every`.

    Writing goes on in the background: the error of an earlier save is raised by the next call or by
    `close`, always as a one-line `CheckpointError`, and never touches an older checkpoint.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        save_interval: int,
        keep: int = 3,
        keep_every: int | None = None,
    ):
        for name, value in (
            ("save_interval", save_interval),
            ("keep", keep),
            ("keep_every", keep_every or 1),
        ):
            if value < 1:
                raise CheckpointError(f"{name}={value} is less than 1: choose a positive number")
        self._directory = epath.Path(directory).expanduser().absolute()
        self._writing: int | None = None
        policies = ocp.checkpoint_managers
        due = [
            policies.FixedIntervalPolicy(save_interval),
            policies.PreemptionCheckpointingPolicy(),
        ]
        kept: list[Any] = [policies.LatestN(keep)]
        if keep_every is not None:
            kept.append(policies.EveryNSteps(keep_every))
        options = ocp.CheckpointManagerOptions(
            save_decision_policy=policies.AnySavePolicy(due),
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,  # what a killed save has left
        )
        with contextlib.ExitStack() as stack:
            self._quiet = stack.enter_context(QuietOrbax())
            try:
                self._manager = _Manager(self._directory, options=options)
            except OSError as error:
                raise CheckpointError(
                    f"cannot keep checkpoints in {self._directory}: {_reason(error)}; "
                    f"pass another directory"
                ) from error
            self._resources = stack.pop_all()  # closed by close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except CheckpointError as failed:
            if error is None:
                raise
            error.add_note(str(failed))

    def save(
        self, step: int, params: Any, train: Any, meta: Mapping[str, Any], force: bool = False
    ) -> bool:
        """Starts to save when a save is due at `step` (or `force`); True if it did.

        Returns as soon as the arrays are copied; they may be donated right after. A step that is
        already saved is left as it is (False).

        Raises:
            CheckpointError: an earlier save failed; a leaf is not an array or is empty; `meta` is
                not JSON; a newer checkpoint than `step` exists, which resuming would prefer.
        """
        if not self._manager.is_saving_in_progress():
            self._wait()
        newest = self._manager.latest_step()
        if newest is not None and newest > step:
            raise CheckpointError(
                f"cannot save step {step} in {self._directory}, which has step {newest}: "
                f"delete the newer steps or pass another directory"
            )
        if newest == step or not (force or self._manager.should_save(step)):
            return False
        trees = {"params": _flatten(params), "train": _flatten(train)}
        envelope = {
            "meta": dict(meta),
            "leaves": {item: _forms(tree) for item, tree in trees.items()},
            "keys": {item: _key_impls(tree) for item, tree in trees.items()},
        }
        try:
            json.dumps(envelope)
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"meta is not JSON ({error}): pass only strings, numbers, None, lists and dicts"
            ) from None
        items = {item: ocp.args.StandardSave(_stored(tree)) for item, tree in trees.items()}
        self._writing = step
        try:
            return self._manager.save(
                step,
                args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(envelope)),
                force=True,
            )
        except Exception as error:
            raise self._unwritten(error) from error

    def latest_step(self) -> int | None:
        """The newest complete checkpoint (one still being written does not count), or None."""
        return max(_steps(self._directory), default=None)

    def restore(
        self, params_abstract: Any, train_abstract: Any, step: int | None = None
    ) -> tuple[int, Any, Any, dict[str, Any]]:
        """Reads `step` (None: the newest) into the structure and shardings of the abstract trees.

        Args:
            params_abstract, train_abstract: pytrees of `jax.ShapeDtypeStruct` or arrays; the result
                has their structure and their shardings (the first device for a leaf without one).

        Returns:
            (step, params, train, meta)

        Raises:
            CheckpointError: no such step; names, shapes or dtypes differ; the files are damaged.
        """
        self._wait()
        step = _choose(self._directory, step)
        folder = self._directory / str(step)
        envelope = _read_envelope(folder)
        restored = []
        for item, abstract in zip(_ITEMS, (params_abstract, train_abstract), strict=True):
            targets = _flatten(abstract)
            _compare(folder, item, envelope["leaves"][item], _forms(targets))
            leaves = _read(folder, item, _with_shardings(targets), envelope)
            restored.append(jax.tree.unflatten(jax.tree.structure(abstract), leaves.values()))
        return step, restored[0], restored[1], envelope["meta"]

    def reached_preemption(self, step: int) -> bool:
        """True in all processes at the same step after the cluster announced a preemption to one.

        Needs `jax.distributed`; always False without it.
        """
        return self._manager.reached_preemption(step)

    def close(self) -> None:
        """Waits until the last save is on disk."""
        with self._resources:
            try:
                self._wait()
            finally:
                self._manager.close()

    def _wait(self) -> None:
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._unwritten(error) from error

    def _unwritten(self, error: Exception) -> CheckpointError:
        self._quiet.stay()
        last = self.latest_step()
        intact = "there is no earlier checkpoint" if last is None else f"step {last} is intact"
        return CheckpointError(
            f"checkpoint of step {self._writing} could not be written to {self._directory}: "
            f"{_reason(error)}; {intact}; free space or pass another directory"
        )


class _Manager(ocp.CheckpointManager):
    """Counts steps from the first one asked for: jax settles on 1 if the notice came before."""

    _first: int | None = None

    def reached_preemption(self, step: int) -> bool:
        # The thread that ends a save asks about its step; jax would think that we stand there.
        if threading.current_thread() is not threading.main_thread():
            return False
        if self._first is None:
            self._first = step
        return super().reached_preemption(step - self._first + 1)


def load_params(
    path: str | os.PathLike[str], step: int | None = None
) -> tuple[dict[str, Any], dict[Any, Any]]:
    """Reads the parameters alone, on any machine, without model, trainer or mesh.

    Args:
        path: run folder or one of its step folders.
        step: which step of a run folder; None is the newest.

    Returns:
        (meta, params): `params` is a nested dict of NumPy arrays by name; the keys of a level whose
        names are all digits (list indices) are ints, as in `flax.nnx.to_pure_dict`.

    Raises:
        CheckpointError: missing folder, no checkpoint in it, no such step, damaged files.
    """
    directory = epath.Path(path).expanduser().absolute()
    if directory.name.isdigit() and (directory / "params").exists():
        if step not in (None, int(directory.name)):
            raise CheckpointError(
                f"step={step}, but {directory} is step {directory.name}: pass {directory.parent}"
            )
        directory, step = directory.parent, int(directory.name)
    folder = directory / str(_choose(directory, step))
    envelope = _read_envelope(folder)
    targets = dict.fromkeys(envelope["leaves"]["params"])
    return envelope["meta"], _nested(_read(folder, "params", targets, envelope))


def load_meta(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The caller's metadata of the newest checkpoint in a run folder, or None if it has none."""
    directory = epath.Path(path).expanduser().absolute()
    steps = _steps(directory) if directory.exists() else []
    return _read_envelope(directory / str(steps[-1]))["meta"] if steps else None


# Leaves and their names


def _flatten(tree: Any) -> dict[str, Any]:
    """{name: leaf} in the order of the tree's leaves."""
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        # An nnx.Variable adds this key below the name of the parameter.
        if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
            path = path[:-1]
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in named:
            raise CheckpointError(f"two leaves have the name {name}: rename one of them")
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise CheckpointError(
                f"{name} is a Python {type(leaf).__name__} ({leaf!r}), not an array: "
                f"make it jnp.asarray({leaf!r})"
            )
        if leaf.size == 0:
            raise CheckpointError(f"{name} has shape {leaf.shape}, no elements to store: drop it")
        named[name] = leaf
    return named


def _nested(leaves: Mapping[str, Any]) -> dict[Any, Any]:
    def with_indices(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        as_key = int if all(key.isdigit() for key in node) else str
        return {as_key(key): with_indices(child) for key, child in node.items()}

    return with_indices(traverse_util.unflatten_dict(dict(leaves), sep="/"))


def _forms(leaves: Mapping[str, Any]) -> dict[str, str]:
    """{name: shape and dtype}; the dtype of a PRNG key names its implementation."""
    impls = _key_impls(leaves)
    return {
        name: f"{tuple(leaf.shape)} "
        + (f"key<{impls[name]}>" if name in impls else str(leaf.dtype))
        for name, leaf in leaves.items()
    }


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impls(leaves: Mapping[str, Any]) -> dict[str, str]:
    impls = {}
    for name, leaf in leaves.items():
        if _is_key(leaf):
            # Inside a trace this also works for an abstract key.
            jax.eval_shape(
                lambda key, name=name: impls.update({name: str(jax.random.key_impl(key))}),
                jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
            )
    return impls


def _stored(leaves: Mapping[str, Any]) -> dict[str, Any]:
    return {n: jax.random.key_data(leaf) if _is_key(leaf) else leaf for n, leaf in leaves.items()}


def _with_shardings(leaves: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """What to read for abstract leaves: for a PRNG key its data, sharded like the key."""
    targets = {}
    for name, leaf in leaves.items():
        form = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        if _is_key(leaf):
            form = jax.eval_shape(jax.random.key_data, form)
        sharding = getattr(leaf, "sharding", None)
        if sharding is None:
            sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        targets[name] = jax.ShapeDtypeStruct(form.shape, form.dtype, sharding=sharding)
    return targets


# Reading


def _steps(directory: epath.Path) -> list[int]:
    return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(directory))


def _choose(directory: epath.Path, step: int | None) -> int:
    if not directory.exists():
        raise CheckpointError(f"{directory} does not exist: pass the folder of a run")
    steps = _steps(directory)
    if not steps:
        raise CheckpointError(
            f"no checkpoint in {directory}: pass the folder of a run that saved one"
        )
    if step is None:
        return steps[-1]
    if step not in steps:
        raise CheckpointError(f"no checkpoint of step {step} in {directory}: choose one of {steps}")
    return step


def _read_envelope(folder: epath.Path) -> dict[str, Any]:
    try:
        envelope = ocp.JsonCheckpointHandler().restore(folder / "meta")
        return {part: envelope[part] for part in ("meta", "leaves", "keys")}
    except Exception as error:
        raise _damaged(folder, "meta", error) from error


def _read(
    folder: epath.Path,
    item: str,
    targets: Mapping[str, jax.ShapeDtypeStruct | None],
    envelope: dict[str, Any],
) -> dict[str, Any]:
    """The named leaves of an item, sharded like their targets, or as NumPy arrays (target None)."""
    leaves = {}
    for name, target in targets.items():
        # Where one process has all shards, it reads the leaf at once, which is faster.
        local = target is not None and target.sharding.is_fully_addressable
        try:
            leaf = _read_leaf(folder / item, name, None if local else target)
        except Exception as error:
            raise _damaged(folder, f"{item} {name}", error) from error
        if target is not None and local:
            leaf = jax.device_put(leaf, target.sharding, may_alias=False)
        impl = envelope["keys"][item].get(name)
        leaves[name] = leaf if impl is None else jax.random.wrap_key_data(leaf, impl=impl)
    return leaves


def _read_leaf(folder: epath.Path, name: str, target: jax.ShapeDtypeStruct | None) -> Any:
    # One leaf at a time: when one of several concurrent reads fails, orbax closes its event loop
    # under the others, which then print tracebacks from threads.
    handler = ocp.PyTreeCheckpointHandler()
    if target is None:
        tree, how = {name: 0}, {name: ocp.RestoreArgs(restore_type=np.ndarray)}
    else:
        tree, how = {name: target}, ocp.checkpoint_utils.construct_restore_args({name: target})
    try:
        args = ocp.args.PyTreeRestore(item=tree, restore_args=how, partial_restore=True)
        return handler.restore(folder, args=args)[name]
    finally:
        handler.close()


def _compare(folder: epath.Path, item: str, there: dict[str, str], here: dict[str, str]) -> None:
    """Names, shapes, dtypes must agree (orbax would cast dtypes silently)."""
    differing = [name for name in here | there if here.get(name) != there.get(name)]
    if differing:
        shown = [
            f"{name}: checkpoint {there.get(name, 'none')}, model {here.get(name, 'none')}"
            for name in differing[:_SHOWN]
        ]
        if len(differing) > _SHOWN:
            shown.append(f"and {len(differing) - _SHOWN} more")
        raise CheckpointError(
            f"{item} of {folder} does not fit: {'; '.join(shown)}: "
            f"use the configuration it was saved with, or another directory"
        )


# Errors


def _damaged(folder: epath.Path, what: str, error: Exception) -> CheckpointError:
    others = [step for step in _steps(folder.parent) if str(step) != folder.name]
    intact = next((s for s in reversed(others) if _is_intact(folder.parent / str(s))), None)
    if intact is None:
        way_out = "no other step here is intact: pass another directory"
    else:
        way_out = f"step {intact} is intact: delete {folder} or ask for step {intact}"
    return CheckpointError(f"checkpoint {folder} is damaged ({what}: {_reason(error)}); {way_out}")


def _is_intact(folder: epath.Path) -> bool:
    try:
        leaves = json.loads((folder / "meta" / "metadata").read_text())["leaves"]
        for item in _ITEMS:
            for name in leaves[item]:
                _read_leaf(folder / item, name, None)
    except Exception:
        return False
    return True


def _reason(error: BaseException) -> str:
    """The operating system's words if there are any in it; else the first line, cut."""
    text = str(error)
    for code in errno.errorcode:
        if os.strerror(code) in text:
            return os.strerror(code)
    line = (text.splitlines() or [""])[0] or type(error).__name__
    return line if len(line) <= 120 else line[:117] + "..."
