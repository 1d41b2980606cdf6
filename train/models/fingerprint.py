"""Fingerprint of a language model, by which interrupted work finds out that it is the same one."""

import hashlib
import json

from train.cli.config_json import as_json
from train.models.load import LanguageModel, checksum, tokenizer_meta


def fingerprint(lm: LanguageModel) -> str:
    """Compute a hash of a model's parameters, configs and tokenizer, in hexadecimal."""
    memory = lm.memgen
    parts = [
        checksum(lm.model if memory is None else memory),
        as_json(lm.model.config),
        memory and as_json(memory.config),
        lm.tokenizer.to_json(),
        tokenizer_meta(lm.tokenizer),
    ]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
