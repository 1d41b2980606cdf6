"""Find the checkpoints of a run folder, read and verify them, and explain damage to the user."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from train.runs import checksums
from train.runs.envelope import ITEMS, read_envelope
from train.runs.files import reason_of
from train.runs.leaves import CheckpointError

_Content = TypeVar("_Content")


def saved_steps(directory: Path) -> list[int]:
    """Return the steps of all complete checkpoints, in increasing order.

    A folder of an incomplete checkpoint is not named after its step.

    Args:
        directory: Run folder.
    """
    names = [path.name for path in directory.iterdir() if path.is_dir()]
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]*", name))


def chosen_step(directory: Path, step: int | None) -> int:
    """Return `step`, or the newest saved step for None; raise a CheckpointError if not saved."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory} does not exist: pass the folder of a run")
    steps = saved_steps(directory)
    if not steps:
        raise CheckpointError(
            f"no checkpoint in {directory}: pass the folder of a run that saved one"
        )
    if step is None:
        return steps[-1]
    if step not in steps:
        raise CheckpointError(f"no checkpoint of step {step} in {directory}: choose one of {steps}")
    return step


def read_step(directory: Path, step: int | None, read: Callable[[Path], _Content]) -> _Content:
    """Read a step folder, even while a run that is still training deletes old steps.

    If reading the newest step fails, and another step has become the newest meanwhile, that step is
    read instead.

    Args:
        directory: Run folder.
        step: Step of the checkpoint; None takes the newest.
        read: Function that reads a step folder; it raises a CheckpointError if it can't.

    Returns:
        Result of `read`.

    Raises:
        CheckpointError: There is no such step, it can't be read, or it was deleted meanwhile.
    """
    while True:
        chosen = chosen_step(directory, step)
        try:
            return read(directory / str(chosen))
        except CheckpointError as error:
            steps = saved_steps(directory)
            if step is None and steps[-1:] != [chosen]:
                continue
            if chosen not in steps:
                raise CheckpointError(
                    f"step {chosen} was deleted from {directory} while it was read, by a run that "
                    f"keeps only its newest ones: choose one of {steps}, or --keep more"
                ) from error
            raise


def verify_checkpoint(
    folder: Path, items: tuple[str, ...], share: int = 0, shares: int = 1
) -> None:
    """Verify the files of a checkpoint's items with `checksums.verify`.

    Raises:
        CheckpointError: A file is damaged, missing or unreadable, or there are no checksums. The
            message tells the user what to do.
    """
    try:
        checksums.verify(folder, items, share, shares)
    except checksums.NoChecksumsError:
        if not (folder / "meta").exists():
            raise damaged(folder, "no checksums, no meta: perhaps another run's folder") from None
        raise CheckpointError(
            f"checkpoint {folder} has no file {checksums.NAME}, so damage could not be seen: if "
            f'you know that its files are whole, write it: python -c "from pathlib import Path; '
            f"from train.runs import checksums; checksums.write(Path('{folder}'))\""
        ) from None
    except checksums.DamagedFileError as error:
        raise damaged(folder, str(error)) from error
    except OSError as error:
        raise _unreadable(folder, error) from error


def checked_envelope(folder: Path) -> dict[str, Any]:
    """Read the item `meta` with `read_envelope`; raise every error as a `CheckpointError`."""
    try:
        return read_envelope(folder)
    except CheckpointError:
        raise
    except OSError as error:
        raise _unreadable(folder, error) from error
    except (ValueError, RecursionError) as error:
        raise damaged(folder, f"meta: {reason_of(error)}") from error


def damaged(folder: Path, damage: str) -> CheckpointError:
    """Make the error for a damaged step; the message names the run's newest intact step, if any."""
    others = [step for step in saved_steps(folder.parent) if str(step) != folder.name]
    intact = next((s for s in reversed(others) if _is_intact(folder.parent / str(s))), None)
    if intact is None:
        way_out = "no other step here is intact: pass another directory"
    else:
        way_out = f"step {intact} is intact: delete {folder} or ask for step {intact}"
    return CheckpointError(f"checkpoint {folder} is damaged ({damage}); {way_out}")


def _unreadable(folder: Path, error: OSError) -> CheckpointError:
    """Make the error for files that the file system fails to read although they may be intact."""
    file = f" ({error.filename})" if error.filename else ""
    return CheckpointError(
        f"checkpoint {folder} can't be read: {reason_of(error)}{file}: it may be whole, mend that"
    )


def _is_intact(folder: Path) -> bool:
    try:
        checksums.verify(folder, ("meta", *ITEMS))
        read_envelope(folder)
    except (OSError, ValueError, RecursionError):
        return False
    return True
