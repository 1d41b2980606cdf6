"""A tokenizer for the models of `tiny`: sixteen letters and a separator."""

from collections.abc import Sequence

import numpy as np
from tiny import heavy_model

from thoughtbubbles import ModelConfig
from train.models.load import LanguageModel

LETTERS = "abcdefghijklmno "


class Letters:
    """Every letter is a token, the space too; 16 is the separator."""

    name, fingerprint, vocab_size, separator = "letters", "letters", 17, 16

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids = np.array([LETTERS.index(letter) for letter in text], np.int32)
        return ids, np.ones_like(ids)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return "".join(LETTERS[token] for token in ids if 0 <= token < 16)

    def to_json(self) -> str:
        return "{}"


def language_model(config: ModelConfig) -> LanguageModel:
    return LanguageModel(heavy_model(config), Letters())
