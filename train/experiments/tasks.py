"""Lookup: a synthetic task in which one token needs several things at once. Pure NumPy."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Bits go by; now and then a token asks which bits stood at several offsets before it.

    A row is `seq_len` tokens. Each carries a random bit, and asks with probability `ask`: token
    `bit + 2 * asks`. The answer to a question at place `t` is the number whose `i`-th binary digit
    is the bit at place `t - offsets[i]` (0 before the row begins). Only answers are scored; they
    never stand in the input.

    One attention head looks sharply at one offset, so a token with few heads needs more layers or
    more streams; tokens that do not ask need none. Difficulty is graded: each offset that is found
    saves ln 2 nats. The Bayes-optimal loss is 0; without looking back it is `chance`.
    """

    offsets: tuple[int, ...] = (1, 3, 6, 10, 15, 21)
    ask: float = 0.4
    seq_len: int = 40

    @property
    def vocab_size(self) -> int:
        """Enough for the 4 input tokens and for every answer."""
        return max(4, 2 ** len(self.offsets))

    @property
    def chance(self) -> float:
        """Mean nats of an answer for a model that knows nothing but its place in the row."""
        known = sum(max(self.seq_len - offset, 0) for offset in self.offsets)
        return known / self.seq_len * float(np.log(2))

    def rows(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """`count` rows `[count, seq_len + 1]` int32, tokens and answers packed together.

        Place `i` holds `token_i + vocab_size * (1 + answer to token_{i-1})`, or `token_i` alone if
        that token did not ask: rows have the layout of packed text, each target one place late.
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

    def asked(self, rows: np.ndarray) -> np.ndarray:
        """Mask `[N, seq_len]` of the tokens of `rows` that ask."""
        return rows[:, 1:] >= self.vocab_size
