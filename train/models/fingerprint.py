"""Fingerprint of a language model, by which interrupted work finds out that it is the same one."""

import hashlib
import json
from typing import Any

from train.cli.config_json import as_json
from train.models.load import LanguageModel, checksum, tokenizer_meta


def fingerprint(lm: LanguageModel, configs: bool = True) -> str:
    """Compute a hash of a model's parameters, configs and tokenizer, in hexadecimal.

    Args:
        lm: Model with its tokenizer.
        configs: Whether the hash covers the configs; then a version whose configs have another
            field computes another hash.
    """
    memory = lm.memgen
    parts: list[Any] = [checksum(lm.model if memory is None else memory)]
    if configs:
        parts += [as_json(lm.model.config), memory and as_json(memory.config)]
    parts += [lm.tokenizer.to_json(), tokenizer_meta(lm.tokenizer)]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
