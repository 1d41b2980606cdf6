"""Write checkpoints asynchronously, verify them, and read them without a trainer.

A run folder holds one folder per saved step with three items. `params` and `train` are flat
mappings from readable names, such as `blocks/attention/q` or `opt/0/mu/embed`, to arrays, which can
be read without Flax or Optax classes. `meta` is JSON: the caller's metadata, and shape and dtype of
every leaf. A step folder gets its final name only when it is complete, including its checksums.
This is the only file that imports orbax.
"""

import contextlib
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import future

from train.devices.distributed import sync_errors
from train.runs import checksums
from train.runs.envelope import ITEMS, make_envelope
from train.runs.files import reason_of
from train.runs.leaves import (
    CheckpointError,
    flatten,
    forms,
    nested,
    read_targets,
    stored,
)
from train.runs.quiet_orbax import QuietOrbax
from train.runs.steps import (
    checked_envelope,
    chosen_step,
    damaged,
    read_step,
    saved_steps,
    verify_checkpoint,
)

_SHOWN = 3  # maximum number of leaves that an error names
_READ_TOGETHER = 2**26  # maximum bytes of leaves that are read in one call


class Checkpointer:
    """Writer and reader of a run's checkpoints; every process of the run must call every method.

    Checkpoints are written in the background. If a save fails, the next call or `close` raises a
    one-line `CheckpointError`, and older checkpoints stay intact.

    Args:
        directory: Run folder, which is made if it does not exist.
        save_interval: Number of steps between checkpoints. A checkpoint is also due when the
            cluster announces a preemption.
        keep: Number of newest checkpoints that are kept.
        keep_every: Interval in steps, at whose multiples checkpoints are kept forever; None for no
            interval.

    Raises:
        CheckpointError: An interval or `keep` is less than 1, or the folder cannot be used.
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
            ("keep_every", 1 if keep_every is None else keep_every),
        ):
            if value < 1:
                raise CheckpointError(f"{name}={value} is less than 1: choose a positive number")
        self._directory = Path(directory).expanduser().absolute()
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
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        self._handlers = {item: _SummedHandler() for item in ITEMS}
        for item, handler in self._handlers.items():
            handlers.add(item, ocp.args.StandardSave, handler)
        with contextlib.ExitStack() as stack:
            self._quiet = stack.enter_context(QuietOrbax())
            try:
                self._manager = _Manager(
                    epath.Path(self._directory), options=options, handler_registry=handlers
                )
            except OSError as error:
                raise CheckpointError(
                    f"cannot keep checkpoints in {self._directory}: {reason_of(error)}; "
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
        """Start to save a checkpoint in the background, if a checkpoint is due.

        The call returns as soon as the arrays are copied, so that the caller may donate them. A
        step that is already saved is not saved again.

        Args:
            step: Number of updates done.
            params: Pytree of arrays (typed PRNG keys included) that `load_params` reads.
            train: Pytree of all other arrays, such as optimizer state, which only resuming needs.
            meta: JSON-serializable metadata of the run.
            force: Whether to save even if no checkpoint is due.

        Returns:
            Whether a save was started.

        Raises:
            CheckpointError: An earlier save or this one failed; a leaf is not an array or is empty;
                `meta` is not JSON-serializable; or the folder has a checkpoint of a later step,
                from which a run would resume.
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
        trees = {"params": flatten(params), "train": flatten(train)}
        envelope = make_envelope(meta, trees)
        try:
            json.dumps(envelope)
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"meta is not JSON ({error}): pass only strings, numbers, None, lists and dicts"
            ) from None
        items = {item: ocp.args.StandardSave(stored(tree)) for item, tree in trees.items()}
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
        """Return the step of the newest complete checkpoint, or None if there is none."""
        return max(saved_steps(self._directory), default=None)

    def restore(
        self, params_abstract: Any, train_abstract: Any, step: int | None = None
    ) -> tuple[int, Any, Any, dict[str, Any]]:
        """Read a checkpoint into the structure and shardings of abstract trees.

        Args:
            params_abstract: Pytree of `jax.ShapeDtypeStruct` or arrays with the structure of the
                saved `params`; a leaf without a sharding is placed on the first local device.
            train_abstract: Pytree like `params_abstract`, with the structure of the saved `train`.
            step: Step of the checkpoint; None takes the newest.

        Returns:
            Step, `params`, `train` and `meta` of the checkpoint.

        Raises:
            CheckpointError: The step is not saved; names, shapes or dtypes of leaves differ from
                the checkpoint's; or the files are damaged.
        """
        self._wait()
        step = chosen_step(self._directory, step)
        folder = self._directory / str(step)
        with sync_errors():
            verify_checkpoint(folder, ("meta", *ITEMS), jax.process_index(), jax.process_count())
        envelope = checked_envelope(folder)
        restored = []
        for item, abstract in zip(ITEMS, (params_abstract, train_abstract), strict=True):
            targets = flatten(abstract)
            _compare(folder, item, envelope["leaves"][item], forms(targets))
            leaves = _read(folder, item, read_targets(targets), envelope)
            restored.append(jax.tree.unflatten(jax.tree.structure(abstract), leaves.values()))
        return step, restored[0], restored[1], envelope["meta"]

    def reached_preemption(self, step: int) -> bool:
        """Return whether to save and stop now, because the cluster announced a preemption.

        The result becomes True in all processes at the same step. Without `jax.distributed`, the
        result is always False.

        Args:
            step: Number of updates done.
        """
        return self._manager.reached_preemption(step)

    def close(self) -> None:
        """Wait until the last save is on disk."""
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

    def _write_checksums(self) -> None:
        """Write the checksums of a step; called in the first process, before the final rename."""
        checksums.write(self._handlers["params"].step_folder)

    def _unwritten(self, error: Exception) -> CheckpointError:
        self._quiet.stay()
        last = self.latest_step()
        intact = "there is no earlier checkpoint" if last is None else f"step {last} is intact"
        return CheckpointError(
            f"checkpoint of step {self._writing} could not be written to {self._directory}: "
            f"{reason_of(error)}; {intact}; free space or pass another directory"
        )


class _SummedHandler(ocp.StandardCheckpointHandler):
    """Orbax's handler that also makes each process write the checksums of its own files."""

    step_folder: Path  # set once all processes have written, before the final rename

    async def async_save(self, directory: epath.Path, *args: Any, **kwargs: Any) -> Any:
        process = jax.process_index()
        return [
            future.ChainedFuture(
                await super().async_save(directory, *args, **kwargs) or [],
                lambda: checksums.write_part(Path(directory), process),
            )
        ]

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        self.step_folder = Path(directory).parent


class _Manager(ocp.CheckpointManager):
    """Orbax's manager that counts steps for preemption from the first `reached_preemption` call.

    If a preemption is announced before this call, jax lets the processes agree on step 1. `close`
    also waits for the thread that deletes the leftovers of a killed save; otherwise that thread
    would print a traceback when the process ends.
    """

    _first: int | None = None

    def close(self) -> None:
        with contextlib.suppress(Exception):  # leftovers that can't be deleted do no harm
            self._maybe_await_cleanup_tmp_directory()
        super().close()

    def reached_preemption(self, step: int) -> bool:
        # Orbax's thread that finishes a save calls this method with the saved step, which jax would
        # take for the current step of the run.
        if threading.current_thread() is not threading.main_thread():
            return False
        if self._first is None:
            self._first = step
        return super().reached_preemption(step - self._first + 1)


def load_params(
    path: str | os.PathLike[str], step: int | None = None
) -> tuple[dict[str, Any], dict[Any, Any]]:
    """Read the parameters of a checkpoint on any machine, without its model, optimizer or mesh.

    Args:
        path: Run folder, or one of its step folders.
        step: Step of the checkpoint in a run folder; None takes the newest.

    Returns:
        Metadata of the run, and a nested dict from names to the parameters as NumPy arrays. Keys
        are ints on a level whose names are all digits (list indices), as in
        `flax.nnx.to_pure_dict`.

    Raises:
        CheckpointError: The folder does not exist, has no checkpoint of this step, or its files
            are damaged.
    """
    directory = Path(path).expanduser().absolute()
    if directory.name.isdigit() and (directory / "params").exists():
        if step not in (None, int(directory.name)):
            raise CheckpointError(
                f"step={step}, but {directory} is step {directory.name}: pass {directory.parent}"
            )
        directory, step = directory.parent, int(directory.name)

    def read(folder: Path) -> tuple[dict[str, Any], dict[Any, Any]]:
        verify_checkpoint(folder, ("meta", "params"))
        envelope = checked_envelope(folder)
        targets = dict.fromkeys(envelope["leaves"]["params"])
        return envelope["meta"], nested(_read(folder, "params", targets, envelope))

    return read_step(directory, step, read)


def load_meta(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read the caller's metadata of the newest checkpoint; None if there is no checkpoint.

    Args:
        path: Run folder.

    Raises:
        CheckpointError: The metadata are damaged.
    """
    directory = Path(path).expanduser().absolute()
    if not directory.is_dir() or not saved_steps(directory):
        return None

    def read(folder: Path) -> dict[str, Any]:
        verify_checkpoint(folder, ("meta",))
        return checked_envelope(folder)["meta"]

    return read_step(directory, None, read)


# Reading


def _read(
    folder: Path,
    item: str,
    targets: Mapping[str, jax.ShapeDtypeStruct | None],
    envelope: dict[str, Any],
) -> dict[str, Any]:
    """Read an item's leaves by name, sharded like the targets, or in NumPy for a target None."""
    leaves = {}
    for names in _groups(targets):
        # A fully addressable leaf is read whole and then placed, which is faster.
        wanted = {name: None if _is_local(targets[name]) else targets[name] for name in names}
        for name, leaf in _read_leaves(folder, item, wanted).items():
            target = targets[name]
            if target is not None and _is_local(target):
                leaf = jax.device_put(leaf, target.sharding, may_alias=False)
            impl = envelope["keys"][item].get(name)
            leaves[name] = leaf if impl is None else jax.random.wrap_key_data(leaf, impl=impl)
    return {name: leaves[name] for name in targets}


def _is_local(target: jax.ShapeDtypeStruct | None) -> bool:
    return target is None or target.sharding.is_fully_addressable


def _groups(targets: Mapping[str, jax.ShapeDtypeStruct | None]) -> Iterator[list[str]]:
    """Yield groups of leaf names to read in one call, since a call of orbax takes milliseconds.

    Groups are limited in size, because a group's leaves are in RAM and in device memory at the same
    time.
    """
    group, size = [], 0
    for name, target in targets.items():
        nbytes = 0 if target is None else math.prod(target.shape) * target.dtype.itemsize
        if not _is_local(target):  # alone, so that every process fails at the same leaf
            yield [name]
            continue
        if group and size + nbytes > _READ_TOGETHER:
            yield group
            group, size = [], 0
        group.append(name)
        size += nbytes
    if group:
        yield group


def _read_leaves(
    folder: Path, item: str, targets: Mapping[str, jax.ShapeDtypeStruct | None]
) -> dict[str, Any]:
    """Read leaves of an item; a CheckpointError names the first leaf that can't be read."""
    try:
        return _read_together(folder / item, targets)
    except Exception as error:
        if len(targets) > 1:
            return {
                name: _read_leaves(folder, item, {name: target})[name]
                for name, target in targets.items()
            }
        (name,) = targets
        raise damaged(folder, f"{item} {name}: {reason_of(error)}") from error


def _read_together(folder: Path, targets: Mapping[str, jax.ShapeDtypeStruct | None]) -> Any:
    handler = ocp.PyTreeCheckpointHandler()
    tree = {name: 0 if target is None else target for name, target in targets.items()}
    how = {
        name: ocp.RestoreArgs(restore_type=np.ndarray)
        if target is None
        else ocp.checkpoint_utils.construct_restore_args(target)
        for name, target in targets.items()
    }
    try:
        args = ocp.args.PyTreeRestore(item=tree, restore_args=how, partial_restore=True)
        return handler.restore(epath.Path(folder), args=args)
    finally:
        handler.close()


def _compare(folder: Path, item: str, there: dict[str, str], here: dict[str, str]) -> None:
    """Raise a CheckpointError unless names, shapes and dtypes agree (orbax would cast dtypes)."""
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
