"""A trained model and its tokenizer from a run folder; no trainer, mesh or optimizer."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from thoughtbubbles import Thoughtbubbles
from train.checkpoint import load_params
from train.config import model_from_json
from train.data import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What a checkpoint holds for a reader.

    Attributes:
        model: with the checkpoint's parameters.
        tokenizer: the one it was trained with.
        config: the run's resolved config as nested dict.
        step: number of training steps.
        data_fingerprint: of the rows it was trained on (`PackedData.fingerprint`).
    """

    model: Thoughtbubbles
    tokenizer: Tokenizer
    config: dict[str, Any]
    step: int
    data_fingerprint: str


def load_model(path: str | Path, step: int | None = None) -> Loaded:
    """Read a run folder (or one of its checkpoints); the newest step if none is named."""
    meta, params = load_params(path, step)
    model = Thoughtbubbles.from_params(model_from_json(meta["config"]["model"]), params)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tokenizer.json")
        file.write_text(meta["tokenizer"])
        tokenizer = load_tokenizer(str(file))
    return Loaded(model, tokenizer, meta["config"], meta["step"], meta["data_fingerprint"])
