"""Export the model of a run as a folder of safetensors, config and tokenizer.

thoughtbubbles export runs/tiny --to tiny_model
thoughtbubbles export runs/sft --to adapter --adapter-only
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from flax import nnx

from thoughtbubbles.adapters import save_adapter
from thoughtbubbles.families import family_of
from thoughtbubbles.pretrained import save_pretrained
from thoughtbubbles.safetensors_files import check_new_folder
from train.cli.command import run_command
from train.cli.numbers import check_least
from train.models.load import LanguageModel, load_model, load_run_adapter, load_weights
from train.runs.metadata import load_run_meta

Format = Literal["auto", "transformers", "thoughtbubbles"]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Write the model of a run as a folder: safetensors, config.json and tokenizer.json.

    Attributes:
        run: Run folder, one of its step folders, or a pretrained model ("smollm2", a Hugging Face
            folder, a .gguf file).
        to: Folder to write, which does not exist yet or is empty.
        step: Step of the checkpoint; the newest checkpoint by default.
        format: Format of the folder: "transformers" can be loaded by that library, but can't hold
            models that fork; "thoughtbubbles" holds every decoder; "auto" chooses "transformers"
            if the model allows it, else "thoughtbubbles". `--model` and `load_pretrained` load both
            formats.
        dtype: Dtype of the stored parameters; the dtype of the embedding by default.
        adapter_only: Whether to write only the LoRA adapter of a fine-tuned run, instead of its
            model. The folder has the format of `peft` (float32), which `--adapter` loads.
    """

    run: tyro.conf.Positional[str]
    to: str
    step: int | None = None
    format: Format = "auto"
    dtype: Dtype | None = None
    adapter_only: bool = False

    def __post_init__(self):
        check_least(self, step=0)
        if self.adapter_only and (self.format != "auto" or self.dtype is not None):
            raise ValueError(
                f"adapter_only with format={self.format}, dtype={self.dtype}: an adapter has one "
                "format and type, leave these out"
            )


def export_model(
    lm: LanguageModel, to: str | Path, format: Format = "auto", dtype: Dtype | None = None
) -> str:
    """Write a model and its tokenizer as a folder.

    Args:
        lm: Model with its tokenizer.
        to: Folder to write, which does not exist yet or is empty.
        format: Format of the folder, as in `ExportConfig.format`.
        dtype: Dtype of the stored parameters; None takes the dtype of the embedding.

    Returns:
        Text that lists the files with their sizes, and states how to load the folder.

    Raises:
        ValueError: The folder is not empty, the disk is too full, the model has latent memory, or
            `format` is "transformers" and no architecture of that library computes the same
            function as the model.
        OSError: The folder can't be written; a partly written folder is removed.
    """
    to = Path(to).expanduser()
    check_new_folder(to)
    if lm.memgen is not None:
        raise ValueError(
            "the model has latent memory around its decoder, which no exported form holds: keep "
            "the checkpoint, or export the weights that it began with"
        )
    config = _with_context(lm)
    chosen, reason = _format(config, format)
    params = nnx.to_pure_dict(nnx.state(lm.model))
    _check_disk(to, params, dtype)
    save_pretrained(to, config, params, lm.tokenizer, dtype=dtype, format=chosen)
    files = {file.name: file.stat().st_size for file in sorted(to.iterdir())}
    listed = ", ".join(f"{name} {_readable(size)}" for name, size in files.items())
    theirs = (
        f"`transformers` loads it as a {family_of(config)}"
        if chosen == "transformers"
        else f"`transformers` does not{reason}"
    )
    return (
        f"{to}: {_readable(sum(files.values()))} ({listed})\n"
        f"--model {to} and load_pretrained load it; {theirs}"
    )


def export_adapter(run: str | Path, to: str | Path, step: int | None = None) -> str:
    """Write the LoRA adapter of a fine-tuned run as a folder that `peft` loads.

    Args:
        run: Run folder, or the folder of one of its steps.
        to: Folder to write, which does not exist yet or is empty.
        step: Step of the checkpoint; None takes the newest.

    Returns:
        Text that states the size of the folder, and how to load the adapter.

    Raises:
        ValueError: The folder is not empty, the run did not train a LoRA adapter, or a layer has
            no name in `transformers`.
        OSError: The folder can't be written; a partly written folder is removed.
    """
    to = Path(to).expanduser()
    check_new_folder(to)
    adapter, base, dropout = load_run_adapter(run, step)
    save_adapter(to, adapter, base=base, dropout=dropout)
    size = _readable(sum(file.stat().st_size for file in to.iterdir()))
    return (
        f"{to}: {size} (adapter of {', '.join(adapter)} for {base})\n"
        f"--model {base} --adapter {to} and PeftModel.from_pretrained load it"
    )


def _load(config: ExportConfig) -> LanguageModel:
    path = Path(config.run).expanduser()
    is_step = path.name.isdigit() and (path / "meta").is_dir()
    if path.is_dir() and (is_step or load_run_meta(path) is not None):
        return load_model(path, config.step)
    if config.step is not None:
        raise ValueError(f"step={config.step}: {config.run} is no run folder: leave --step out")
    return load_weights(config.run)


def _with_context(lm: LanguageModel) -> Any:
    """Return the model's config with the context length that the model was pretrained with.

    A run that was fine-tuned on shorter rows keeps the context length of its pretraining.
    """
    config = lm.model.config
    length = config.context_length or lm.context_length
    scaling = getattr(config, "rope_scaling", None)
    if length is not None and scaling is not None:  # pretrained on the original length
        length = max(length, scaling.original_max_position_embeddings or 0)
    return dataclasses.replace(config, context_length=length)


def _format(model: Any, format: Format) -> tuple[Literal["transformers", "thoughtbubbles"], str]:
    """Return the folder's format, and why "auto" did not choose `transformers` ("" if it did)."""
    if format != "auto":
        return format, ""
    try:
        family_of(model)
    except ValueError as error:
        return "thoughtbubbles", f" ({str(error).partition(': ')[0]})"
    return "transformers", ""


def _check_disk(to: Path, params: Any, dtype: str | None) -> None:
    """Raise a ValueError if the disk has too little space for the parameters."""
    leaves = nnx.traversals.flatten_mapping(params).values()
    size = sum(leaf.size * np.dtype(dtype or leaf.dtype).itemsize for leaf in leaves)
    folder = next(parent for parent in to.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ValueError(
            f"the weights take {_readable(size)}, {folder} has {_readable(free)} left: choose "
            "another --to, or --dtype bfloat16"
        )


def _readable(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"


def main(config: ExportConfig) -> None:
    """Export the model or the adapter, and print what was written."""
    check_new_folder(Path(config.to).expanduser())  # before anything is read
    if config.adapter_only:
        print(export_adapter(Path(config.run).expanduser(), config.to, config.step))
        return
    print(export_model(_load(config), config.to, config.format, config.dtype))


def command() -> None:
    run_command(main, ExportConfig)


if __name__ == "__main__":
    command()
