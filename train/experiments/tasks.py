"""Synthetic task `Lookup`, in which one prediction needs several earlier tokens. Pure NumPy."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Random bits, and questions about the bits at several offsets before them.

    A row has `seq_len` tokens. Each token carries a random bit and is a question with probability
    `ask`; the token's id is `bit + 2 * question`. The answer to a question at position t is the
    number whose i-th binary digit is the bit at position t - offsets[i] (0 before the row begins).
    Only answers are scored, and answers are never part of the input.

    One attention head attends sharply to one offset, so that a question needs several heads, layers
    or streams, and other tokens need none of these. Difficulty is graded: each offset that a model
    finds saves ln 2 nats. The Bayes-optimal loss is 0; the best loss without attention to other
    positions is `chance`.

    Attributes:
        offsets: Distances of the bits that a question is about.
        ask: Probability that a token is a question.
        seq_len: Number of tokens per row.
    """

    offsets: tuple[int, ...] = (1, 3, 6, 10, 15, 21)
    ask: float = 0.4
    seq_len: int = 40

    @property
    def vocab_size(self) -> int:
        """Number of ids, enough for the 4 input tokens and for every answer."""
        return max(4, 2 ** len(self.offsets))

    @property
    def chance(self) -> float:
        """Mean nats of an answer for a model that knows only the question's position in the row."""
        known = sum(max(self.seq_len - offset, 0) for offset in self.offsets)
        return known / self.seq_len * float(np.log(2))

    def rows(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Sample rows `[count, seq_len + 1]` int32, with tokens and answers packed together.

        Position i holds `token_i + vocab_size * (1 + answer to token_{i-1})`, or `token_i` alone if
        token i - 1 is not a question. Rows have the layout of packed text: a target stands one
        position after the token that predicts it.
        """
        bits = rng.integers(0, 2, (count, self.seq_len + 1))
        asks = rng.random(bits.shape) < self.ask
        answers = np.zeros_like(bits)
        for digit, offset in enumerate(self.offsets):
            answers[:, offset:] += bits[:, : bits.shape[1] - offset] << digit
        packed = bits + 2 * asks
        expected = np.where(asks, 1 + answers, 0)[:, :-1]
        packed[:, 1:] += self.vocab_size * expected
        return packed.astype(np.int32)

    def is_question(self, rows: np.ndarray) -> np.ndarray:
        """Return which tokens ask for an answer at the next position, `[N, seq_len]` bool.

        Args:
            rows: Rows `[N, seq_len + 1]` int32, as the method `rows` returns them.
        """
        return rows[:, 1:] >= self.vocab_size
