"""Log-likelihoods of continuations given contexts, in batches of rows of similar length."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from thoughtbubbles import Architecture
from thoughtbubbles.decoding import decoding_form
from thoughtbubbles.prefill import empty_cache, in_blocks, long_cache, read_blocks
from train.models.load import LanguageModel
from train.models.text_memory import check_text_memory, memory_errors

SHORTEST_ROW = 16
AT_ONCE = 8  # number of positions of a row whose logits are in memory at the same time


class Row(NamedTuple):
    """Token ids of a context and a continuation, of which the continuation is scored.

    Attributes:
        ids: Token ids of context and continuation.
        start: Index of the first scored id, 1 or more: `ids[start:]` are scored.
    """

    ids: list[int]
    start: int


class Score(NamedTuple):
    """A model's score of a continuation.

    Attributes:
        log_prob: Log-probability of the continuation, in nats.
        greedy: Whether each token of the continuation is the most probable token.
        tokens: Number of tokens of the continuation.
    """

    log_prob: float
    greedy: bool
    tokens: int


class Scorer:
    """Scorer of texts with a model; it compiles one program for each power of two in row length.

    Each token is scored given its prefix only. A causal model scores a row in one forward pass, or
    block by block if one pass would need much memory. For a policy that looks at the whole row
    (`TopK`), each scored token gets a row of its own, which ends with this token. Except for float
    rounding, the score of a row does not depend on the other rows of its batch.

    Args:
        lm: Model and tokenizer.
        batch_size: Number of rows in a forward pass; smaller batches are padded to this number.
        max_length: Maximum number of tokens that the model reads at a time; by default the context
            length that the model was trained with, or no limit if that length is unknown.
        quiet: Whether to hide the progress bars.

    Attributes:
        encode: Function that encodes a context as token ids: `lm.prompt`, unless replaced for
            contexts in a chat template.
        truncated: Number of rows so far whose context was truncated on the left.

    Raises:
        ValueError: `batch_size` or `max_length` is below 1, or the model has latent memory.
    """

    def __init__(
        self,
        lm: LanguageModel,
        batch_size: int = 16,
        max_length: int | None = None,
        quiet: bool = False,
    ):
        if batch_size < 1 or (max_length is not None and max_length < 1):
            raise ValueError(f"batch_size={batch_size} max_length={max_length}: choose 1 or more")
        if lm.memgen is not None:
            raise ValueError(
                "tasks are scored without latent memory, and this run has a weaver: score the "
                "weights that it was trained with"
            )
        self.encode: Callable[[str], list[int]] = lm.prompt
        self.truncated = 0
        self.max_length = lm.context_length if max_length is None else max_length
        self._lm, self._batch_size, self.quiet = lm, batch_size, quiet
        self._causal = lm.model.config.causal

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """Score (context, continuation) pairs.

        Raises:
            ValueError: A continuation adds no token to its context, or more than `max_length`
                tokens; a score is NaN; or the rows don't fit into memory.
        """
        return self.score([self.row(*pair) for pair in pairs])

    def row(self, context: str, continuation: str) -> Row:
        """Encode a context and a continuation as one text, and find where the continuation begins.

        Spaces at the end of the context are moved to the continuation, since tokens of words begin
        with a space. An empty context has the ids `encode("")`. Special tokens that the tokenizer
        adds behind a text are left out. A context that is too long for `max_length` is truncated on
        the left.

        Raises:
            ValueError: The continuation adds no token to the context, or more than `max_length`
                tokens.
        """
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        before = self.encode(kept)
        if kept:
            ids = before + self.encode(kept + continuation)[len(before) :]
        else:
            ids = before + self._lm.tokenizer.encode(continuation)[0].tolist()
        new = len(ids) - len(before)
        if not new:
            raise ValueError(
                f"continuation {continuation!r} of {kept[-20:]!r} has no token of its own: it is "
                "empty or melts into the context, begin it with a space"
            )
        if self.max_length is not None and new > self.max_length:
            raise ValueError(
                f"continuation {continuation[:40]!r} has {new} tokens, the model reads "
                f"{self.max_length} at a time: shorten it, or take a model that reads more"
            )
        return self._cut(Row(ids, len(before)))

    def rolling(self, texts: Sequence[str]) -> list[Score]:
        """Score whole texts, each with the ids `encode("")` as its context.

        A text longer than `max_length` is read in windows of `max_length` tokens, so that each
        token is scored once. The last window begins early enough to be full. An empty text has
        log-probability 0.
        """
        before = self.encode("")
        rows, counts = [], []
        for text in texts:
            ids = [*before, *self._lm.tokenizer.encode(text)[0].tolist()]
            windows = list(_windows(ids, len(before), self.max_length or len(ids)))
            rows += windows
            counts.append(len(windows))
        scores = iter(self.score(rows))
        return [_sum([next(scores) for _ in range(count)]) for count in counts]

    def score(self, rows: Sequence[Row]) -> list[Score]:
        """Score the ids `row.ids[row.start:]` of each row."""
        if self._causal:
            return self._score_rows(rows)
        prefixes = [
            Row(row.ids[: end + 1], end) for row in rows for end in range(row.start, len(row.ids))
        ]
        scores = iter(self._score_rows(prefixes))
        return [_sum([next(scores) for _ in row.ids[row.start :]]) for row in rows]

    def _score_rows(self, rows: Sequence[Row]) -> list[Score]:
        """Score rows in batches of one width, the longest rows first."""
        by_width: dict[int, list[int]] = {}
        for index in sorted(range(len(rows)), key=lambda index: -len(rows[index].ids)):
            by_width.setdefault(self._width(rows[index]), []).append(index)
        found: dict[int, Score] = {}
        with tqdm(total=len(rows), unit="row", disable=self.quiet or None) as progress:
            for width, members in by_width.items():
                check_text_memory(
                    self._lm.model, self._batch_size, width, cached=False, blocks=True
                )
                for first in range(0, len(members), self._batch_size):
                    batch = members[first : first + self._batch_size]
                    scores = self._pass([rows[index] for index in batch], width)
                    found |= zip(batch, scores, strict=True)
                    progress.update(len(batch))
        return [found[index] for index in range(len(rows))]

    def _cut(self, row: Row) -> Row:
        """Drop the oldest ids of a row that is longer than the model can read at once."""
        if self.max_length is None:
            return row
        more = len(row.ids) - self.max_length - 1  # the last id is not read
        if more <= 0:
            return row
        self.truncated += 1
        return Row(row.ids[more:], row.start - more)

    def _width(self, row: Row) -> int:
        """Return the number of input tokens of the compiled program that scores the row."""
        width = max(SHORTEST_ROW, 1 << (len(row.ids) - 2).bit_length())
        return width if self.max_length is None else min(width, self.max_length)

    def _pass(self, rows: list[Row], width: int) -> list[Score]:
        tokens = np.full((self._batch_size, width + 1), -1, np.int32)
        tokens[:, 0] = 0  # a row that pads the batch has one input token and no scored token
        start = np.ones(self._batch_size, np.int32)
        for index, row in enumerate(rows):
            tokens[index, : len(row.ids)] = row.ids
            start[index] = row.start
        with memory_errors(self._lm.model, self._batch_size, width):
            if in_blocks(self._lm.model, self._batch_size, width):
                totals, greedy = self._in_blocks(tokens, start)
            else:
                nats, greedy = score_rows(self._lm.model, jnp.asarray(tokens), jnp.asarray(start))
                totals = np.asarray(nats, np.float64).sum(axis=1)
        if np.isnan(totals).any():
            raise ValueError("the logits are NaN: check the parameters, or compute in float32")
        found = zip(rows, totals.tolist(), np.asarray(greedy).tolist(), strict=False)
        return [Score(-total, hit, len(row.ids) - row.start) for row, total, hit in found]

    def _in_blocks(self, tokens: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compute `[B]` nats float64 of rows block by block, and whether greedy decoding agrees."""
        model, width = decoding_form(self._lm.model, None), tokens.shape[1] - 1
        end = (tokens >= 0).sum(axis=1, dtype=np.int32)
        totals, greedy = np.zeros(len(tokens)), np.ones(len(tokens), bool)

        def step(cache: Any, block: jax.Array, count: jax.Array, place: slice) -> Any:
            size = block.shape[1]
            targets = tokens[:, place.start + 1 : place.stop + 1]
            targets = np.pad(targets, ((0, 0), (0, size - targets.shape[1])))
            # Range of positions within this block that predict a scored token.
            first, last = (np.clip(n - 1 - place.start, 0, size) for n in (start, end))
            cache, nats, leads = score_block(model, cache, block, targets, count, first, last)
            np.add(totals, np.asarray(nats, np.float64).sum(axis=1), out=totals)
            np.logical_and(greedy, np.asarray(leads), out=greedy)
            return cache

        rows = np.maximum(tokens[:, :-1], 0), np.maximum(end - 1, 1)
        cache = empty_cache(model, len(tokens), long_cache(width))
        with tqdm(total=int(rows[1].max()), unit="token", disable=self.quiet or None) as bar:

            def progress(done: int, total: int) -> None:
                bar.update(done - bar.n)

            read_blocks(step, cache, *rows, progress=progress)
        return totals, greedy


@jax.jit
def score_rows(
    model: Architecture, tokens: jax.Array, start: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Compute the nats of the tokens of each row from index `start` to the end of the row.

    Logits are computed for a few positions at a time, and only where a token is scored.

    Args:
        model: Any architecture.
        tokens: Token ids `[B, T + 1]` int32, padded with -1 on the right.
        start: Index `[B]` int32 of the first token of each row that is scored, 1 or more.

    Returns:
        Nats `[B, T']` float32 with T' >= T, in which column 0 belongs to the first scored token and
        columns after the last scored token are 0; and whether each scored token of a row is the
        most probable token, `[B]` bool.
    """
    end = (tokens >= 0).sum(axis=1, dtype=jnp.int32)
    output = model.run(jnp.maximum(tokens[:, :-1], 0), jnp.maximum(end - 1, 1))
    return _nats(model, output, tokens[:, 1:], start - 1, end - 1)


@functools.partial(jax.jit, donate_argnames="cache")
def score_block(
    model: Architecture,
    cache: Any,
    tokens: jax.Array,
    targets: jax.Array,
    count: jax.Array,
    start: jax.Array,
    end: jax.Array,
) -> tuple[Any, jax.Array, jax.Array]:
    """Score one block of `C` tokens per row, as `score_rows` does, with earlier tokens in a cache.

    Args:
        model: Model that can be decoded with a cache.
        cache: Decoding cache of the earlier tokens, which is donated.
        tokens: Token ids `[B, C]` int32 of the block.
        targets: Next token id `[B, C]` int32 of each token of the block.
        count: Number `[B]` int32 of real tokens of the block, which padding follows.
        start: First position `[B]` int32 of the block whose target is scored.
        end: Last position whose target is scored, plus 1, `[B]` int32.

    Returns:
        Cache that includes the block; then nats, and whether each scored token is the most probable
        token, as in `score_rows`.
    """
    output, cache = model.advance(cache, tokens, count)
    return cache, *_nats(model, output, targets, start, end)


def _nats(
    model: Architecture, output: Any, targets: jax.Array, start: jax.Array, end: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Compute what `score_rows` returns, for the targets of positions `start` to `end - 1`."""

    def at(position: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Compute nats `[B]` of one target per row, and whether it is the most probable token."""
        real = position < end
        position = jnp.where(real, position, 0)
        target = jnp.take_along_axis(targets, position[:, None], axis=1)
        logits = model.logits_at(output, position)
        mine = jnp.take_along_axis(logits, target, axis=1)[:, 0]
        nats = jax.nn.logsumexp(logits, axis=-1) - mine
        return jnp.where(real, nats, 0), (logits.argmax(axis=-1) == target[:, 0]) | ~real

    def step(carry):
        index, nats, greedy = carry
        positions = start + index + jnp.arange(AT_ONCE)[:, None]
        new, leads = jax.vmap(at)(positions)
        nats = jax.lax.dynamic_update_slice(nats, new.T, (0, index))
        return index + AT_ONCE, nats, greedy & leads.all(axis=0)

    batch, width = targets.shape
    capacity = -(-width // AT_ONCE) * AT_ONCE
    carry = (jnp.int32(0), jnp.zeros((batch, capacity)), jnp.ones((batch,), bool))
    most = (end - start).max()
    _, nats, greedy = jax.lax.while_loop(lambda carry: carry[0] < most, step, carry)
    return nats, greedy


def _windows(ids: list[int], first: int, length: int) -> Iterator[Row]:
    """Yield rows that read up to `length` ids each, and together score each of `ids[first:]` once.

    The last row scores the remaining ids, after as many ids of context as fit.
    """
    done, end = first, min(length + 1, len(ids))
    while done < end:
        begin = max(end - length - 1, 0)
        yield Row(ids[begin:end], done - begin)
        done, end = end, min(end + length, len(ids))


def _sum(scores: Sequence[Score]) -> Score:
    log_probs = sum(score.log_prob for score in scores)
    greedy = all(score.greedy for score in scores)
    return Score(log_probs, greedy, sum(score.tokens for score in scores))
