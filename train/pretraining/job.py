"""The training job of pretraining: model, packed rows, loss and evaluation."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx
from flax.nnx import filterlib

from thoughtbubbles import ArchitectureConfig, ModelConfig
from thoughtbubbles.pretrained import load_pretrained, open_pretrained
from thoughtbubbles.retrofit import add_forks, forking_config
from thoughtbubbles.testing import assert_budget
from train.data import (
    Batch,
    DataConfig,
    MixtureData,
    MixtureReader,
    PackedData,
    TrainReader,
    load_tokenizer,
    parse_mixture,
    prepare,
)
from train.data.mixture import is_mixture
from train.devices.mesh import check_batch, make_mesh, state_shardings
from train.engine.loop import run
from train.engine.memory import training_memory
from train.engine.state import EVERY_PARAMETER, Trainable, TrainState, make_trainable
from train.engine.step import TrainStep, make_train_step
from train.evaluation.held_out import Evaluator, readable
from train.models.load import find_weights, keep_tokenizer, tokenizer_meta
from train.pretraining.config import RunConfig
from train.pretraining.mixture import SOURCE_SUMS, mixture_loss, mixture_metrics
from train.pretraining.plan import describe
from train.pretraining.presets import PRESETS
from train.runs.metadata import load_run_meta, rows_of_other_python

TRAINED: dict[str, filterlib.Filter] = {
    "all": EVERY_PARAMETER,
    "forks": nnx.PathContains("forks"),
}
"""Filter of the trained parameters for each value of `RunConfig.train`."""


class PretrainJob:
    """The job that `train.engine.loop.run` trains for a `RunConfig` (see `TrainingJob`).

    Args:
        config: Config of the run.

    Raises:
        ValueError: The config has a mistake.
    """

    keeps_frozen = True

    def __init__(self, config: RunConfig):
        self.config = on_weights(config)
        self.trainable = make_run(self.config)
        self.meta: dict[str, Any] = {}
        if weights := config.init.weights:
            self.meta = tokenizer_meta(open_pretrained(find_weights(weights))[2])
        self._mixture: MixtureData | None = None
        self._sources: dict[str, np.ndarray] = {}  # sums of each source since the last metrics
        self.seq_len, self.step_flops = self.config.data.seq_len, self.config.step_flops
        self._evaluator = Evaluator(
            self.trainable, config.batch_size // config.accumulate, config.evaluation
        )

    def prepare(self) -> PackedData:
        saved = load_run_meta(self.config.out)
        stored = rows_of_other_python(saved)
        data = prepare(self.config.data, stored)
        if saved and stored and data.fingerprint == saved["data_fingerprint"]:
            self.meta["python"] = saved.get("python") or ""  # the rows come from its library
        self._mixture = data if isinstance(data, MixtureData) else None
        return data

    def reader(self, data: PackedData, local_rows: np.ndarray | None) -> TrainReader:
        size, seed = self.config.batch_size, self.config.data.seed
        if isinstance(data, MixtureData):
            return MixtureReader(data, size, seed, local_rows)
        return TrainReader(data.train, size, seed, local_rows)

    def inputs(self, batch: Batch) -> Any:
        if self._mixture is None:
            return batch["tokens"]
        return {name: batch[name] for name in ("tokens", "source")}

    def train_step(self) -> TrainStep:
        trainable, parts = self.trainable, self.config.accumulate
        if self._mixture is None:
            return make_train_step(trainable, parts)
        return make_train_step(trainable, parts, mixture_loss(len(self._mixture.parts)))

    def observe(self, sums: Mapping[str, Any]) -> None:
        if self._mixture is not None:
            for name in SOURCE_SUMS & sums.keys():
                self._sources[name] = self._sources.get(name, 0) + np.asarray(sums[name])

    def step_metrics(
        self, sums: Mapping[str, Any], step: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        trainable, metrics = self.trainable, {}
        if self._mixture is not None:
            given = {**sums, **self._sources}
            self._sources = {}
            metrics, sums = mixture_metrics(self._mixture, given, self._sequences(step))
        given = trainable.config, sums
        return (
            trainable.architecture.step_metrics(*given) | metrics,
            trainable.architecture.step_histograms(*given),
        )

    def progress(self, step: int) -> str:
        if self._mixture is None:
            return ""
        seen = self._mixture.progress(self._sequences(step))
        return " ".join(f"{name} {share:.0%}" for name, (share, _) in seen.items())

    def _sequences(self, step: int) -> int:
        """Number of sequences that the run has read after `step` steps."""
        return step * self.config.batch_size

    def first_state(self) -> TrainState:
        return initial_state(self.trainable, self.config)

    def evaluate(self, state: TrainState, data: PackedData) -> dict[str, float]:
        return self._evaluator(state.variables, data.validation)

    def readable(self, held_out: dict[str, float]) -> str:
        return readable(held_out)

    def describe(self, start: int) -> str:
        lines = [describe(self.config, self.trainable, start)]
        if self.config.train != "all":
            trained = self.trainable.num_trained
            lines.append(f"trained are {trained:,} parameters, those of the {self.config.train}")
        if self._mixture is not None:
            lines += self._mixture.outlook(self._sequences(self.config.steps))
        return "\n".join(lines)


def make_run(config: RunConfig) -> Trainable:
    """Check a config, and make the static side of its run's state.

    No parameter is allocated. A fork policy from outside this library is tested on random rows.

    Raises:
        ValueError: The batch does not divide over micro-batches and mesh, the tokenizer has more
            ids than the model, the corpus or the fork policy has a mistake, `train="forks"` has
            nothing to train, or the state does not fit into memory (not checked in a dry run).
    """
    mesh = make_mesh(config.mesh)
    check_batch(config.batch_size, config.accumulate, mesh)
    check_vocabulary(config)
    if is_mixture(config.data.corpus):
        parse_mixture(config.data.corpus)  # its mistakes are found before anything is opened
    if config.train == "forks" and not getattr(config.model, "fork_layers", ()):
        raise ValueError(
            "train='forks', and the model has no fork layers: add --init.forks (to pretrained "
            "weights) or --model.fork-layers, or train all"
        )
    if isinstance(config.model, ModelConfig) and config.model.fork_layers:
        _check_budget(config.model, config.data.seq_len)
    trainable = make_trainable(
        config.model,
        config.optimizer,
        config.steps,
        mesh,
        config.seed,
        config.attention,
        TRAINED[config.train],
    )
    if not config.dry_run:  # a dry run may be for another machine: its plan says the memory
        training_memory(trainable, config.batch_size, config.data.seq_len).check()
    return trainable


def _check_budget(model: ModelConfig, seq_len: int) -> None:
    """Raise a ValueError if a policy from outside this library keeps more than its capacity.

    The policy is tested on random rows of the run's length. Without `forced_keep`, where originals
    compete with forks, policies are not checked.
    """
    policy = model.policy
    if type(policy).__module__.startswith("thoughtbubbles.") or not model.forced_keep:
        return
    try:
        assert_budget(policy, rows=2, num_tokens=seq_len)
    except AssertionError as error:
        raise ValueError(f"policy={policy!r}: {error}") from error


def on_weights(config: RunConfig) -> RunConfig:
    """Set a config's model and tokenizer from the pretrained weights that the run starts from.

    A copy of the tokenizer is stored in the cache of prepared data. The parameters are not read.

    Returns:
        New config; the unchanged config if `init.weights` is empty.

    Raises:
        ValueError: The weights don't exist or have another architecture, or the config itself sets
            the model or the tokenizer.
    """
    if not config.init.weights:
        return config
    if not isinstance(config.model, ModelConfig):
        raise ValueError(
            f"init.weights={config.init.weights!r} bring their own architecture: leave "
            "--architecture out"
        )
    _, model, tokenizer = open_pretrained(find_weights(config.init.weights))
    if not isinstance(model, ModelConfig):
        raise ValueError(
            f"init.weights={config.init.weights!r} hold a {type(model).__name__}, pretraining goes "
            "on from a Thoughtbubbles or a plain decoder alone: name one of those"
        )
    if config.init.forks:
        model = forking_config(model, config.init.forks, config.init.policy)
    fields = (*config.model.execution_fields, "dtype")
    computing = {name: getattr(config.model, name) for name in fields}
    model = dataclasses.replace(model, **computing)

    def asked(known: ArchitectureConfig) -> list[str]:
        """Return the fields of `config.model` that differ from `known`, except `computing`."""
        given, default = dataclasses.asdict(config.model), dataclasses.asdict(known)
        return [n for n in given if n not in computing and given[n] != default[n]]

    presets = [run.model for run in PRESETS.values() if isinstance(run.model, ModelConfig)]
    if names := min(map(asked, (model, *presets)), key=len):
        raise ValueError(
            f"model.{names[0]}={getattr(config.model, names[0])!r}: the model comes with the "
            f"weights {config.init.weights}: leave it out (forks are --init.forks, --init.policy)"
        )
    name = keep_tokenizer(tokenizer, config.data)
    if config.data.tokenizer not in (DataConfig().tokenizer, name):
        raise ValueError(
            f"data.tokenizer={config.data.tokenizer!r}: the weights {config.init.weights} bring "
            "their own: leave it out"
        )

    data = dataclasses.replace(config.data, tokenizer=name)
    return dataclasses.replace(config, model=model, data=data)


def check_vocabulary(config: RunConfig) -> None:
    """Raise a ValueError if the tokenizer has more ids than the model has embeddings."""
    tokenizer = load_tokenizer(config.data.tokenizer_source)
    size = tokenizer.vocab_size
    if size > config.model.vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.name} has {size} ids, model.vocab_size="
            f"{config.model.vocab_size}: pass --model.vocab-size {-(-size // 64) * 64}"
        )


def initial_state(trainable: Trainable, config: RunConfig) -> TrainState:
    """Create the state of step 0, from random parameters or from `config.init`'s weights and forks.

    Args:
        trainable: Static side of the run's state, from `make_run`.
        config: Config of the run.
    """
    init = config.init
    if not init.weights:
        return trainable.init()
    model, params, _ = load_pretrained(
        find_weights(init.weights), shardings=lambda state: state_shardings(state, trainable.mesh)
    )
    if init.forks:
        layers, policy = init.forks, init.policy
        _, params = add_forks(model, params, layers=layers, policy=policy, seed=config.seed)
    return trainable.init_from(params)


def train(config: RunConfig) -> dict[str, float]:
    """Train a pretraining run to its end (`train.engine.loop.run`); return its held-out metrics."""
    return run(lambda: PretrainJob(config), config)
