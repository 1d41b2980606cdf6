"""Read batches by step number: random access, any number of hosts, the same order every time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, cast

import numpy as np

from train.data.config import DataError
from train.data.packing import PADDING, PackedRows

Batch = dict[str, np.ndarray]


class TrainReader:
    """Reader of batches of a split's rows, in an endless order that is shuffled anew in each epoch.

    The global batch of step s is rows s·B to (s + 1)·B - 1 of this order; each process reads its
    local rows of the batch. The step number is therefore the whole state of the reader, and batches
    do not depend on the number of processes.

    Args:
        rows: Rows of the split.
        global_batch: Number of rows per batch over all processes, B.
        seed: Seed of the shuffle.
        local_rows: Indices, from 0 to B - 1, of the rows of a batch that this process reads; None
            reads all of them.

    Raises:
        DataError: The batch size is less than 1.

    Attributes:
        end: Number of steps for which there are batches; None if batches never end.
    """

    end: int | None = None

    def __init__(
        self, rows: PackedRows, global_batch: int, seed: int, local_rows: np.ndarray | None = None
    ):
        check_size(global_batch)
        self._rows, self._local_rows = rows, local_rows
        order = shuffled(len(rows), seed)
        # An endless order has no remainder; without drop_remainder grain 0.2.18 overflows for
        # batches of one row.
        self._batches = order.batch(global_batch, drop_remainder=True).map(self._read)

    def batch(self, step: int) -> Batch:
        """Read the b local rows of the batch of a step.

        Args:
            step: Number of the step, from 0.

        Returns:
            Mapping from name to array: "tokens" [b, seq_len + 1], int32, and "rows" [b], int64, the
            index of each row in the split. A mixture also has "source" [b], int32, the number of
            each row's source; its "rows" are indices within the source.
        """
        return cast(Batch, self._batches[step])  # only a filtered data set has gaps

    def iterate(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """Yield the batches of all steps from `start_step` on, prefetched by two threads.

        The threads end when the iterator is closed or garbage-collected.

        Args:
            start_step: Number of the first step.
        """
        import grain

        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        batches = iter(self._batches[start_step:].to_iter_dataset(options))
        try:
            yield from batches
        finally:
            batches.close()

    def _read(self, rows: np.ndarray) -> Batch:
        rows = rows if self._local_rows is None else rows[self._local_rows]
        tokens, _ = self._rows.read(rows)
        return {"tokens": tokens, "rows": rows.astype(np.int64)}


def evaluation_batches(
    rows: PackedRows, batch_size: int, limit: int | None = None
) -> Iterator[Batch]:
    """Read rows that are evenly spaced over a split, in order and without repeats.

    Neighbouring rows often come from the same document, so the first rows would be a poor sample.

    Args:
        rows: Rows of the split.
        batch_size: Number of rows per batch, b. The last batch is padded to b rows with rows of
            tokens -1 and 0 bytes.
        limit: Maximum number of rows to read; None reads all of them.

    Returns:
        Iterator over batches, each a mapping from name to array: "tokens" [b, seq_len + 1], int32,
        with -1 after the end of the text, and "bytes" [b], int32, the number of bytes of text that
        the targets of each row stand for.

    Raises:
        DataError: The batch size is less than 1.
    """

    def read(indices: np.ndarray) -> Batch:
        tokens, sizes = rows.read(indices)
        return {"tokens": tokens, "bytes": sizes}

    padding = {"tokens": PADDING, "bytes": 0}
    return padded_batches(read, len(rows), batch_size, limit, padding)


def padded_batches(
    read: Callable[[np.ndarray], Batch],
    num_rows: int,
    batch_size: int,
    limit: int | None,
    padding: Mapping[str, int],
) -> Iterator[Batch]:
    """Yield batches of rows that are evenly spaced over a split, in order and without repeats.

    Args:
        read: Function from row indices [b] to a batch, a mapping from name to array [b, ...].
        num_rows: Number of rows of the split.
        batch_size: Number of rows per batch, b; the last batch is padded to b rows.
        limit: Maximum number of rows to read; None reads all of them.
        padding: Mapping from the name of each array to the value that fills its padding rows.

    Raises:
        DataError: The batch size is less than 1.
    """
    check_size(batch_size)
    count = num_rows if limit is None else min(limit, num_rows)
    chosen = np.arange(count) * num_rows // max(count, 1)
    for start in range(0, count, batch_size):
        batch = read(chosen[start : start + batch_size])
        missing = batch_size - len(chosen[start : start + batch_size])
        yield {
            name: np.concatenate(
                [part, np.full((missing, *part.shape[1:]), padding[name], part.dtype)]
            )
            for name, part in batch.items()
        }


def shuffled(size: int, seed: int, *more: int) -> Any:
    """Make an endless order of row indices; each epoch is another permutation of all rows.

    Args:
        size: Number of rows.
        seed: Seed of the shuffle.
        more: More integers to mix into the seed, for different orders with the same `seed`.

    Returns:
        `grain.MapDataset` of row indices, with random access.
    """
    import grain  # here: what reads no packed rows runs without it

    # grain adds the epoch to the seed: without the hash, seed 1 would begin with the second epoch
    # of seed 0.
    entropy = [seed, *more] if more else seed
    key = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    return grain.MapDataset.range(size).shuffle(seed=key).repeat()


def check_size(batch_size: int) -> None:
    """Raise a DataError for a batch size below 1."""
    if batch_size < 1:
        raise DataError(f"a batch of {batch_size} rows: choose at least 1")
