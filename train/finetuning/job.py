"""The training job of supervised fine-tuning: model, chat rows, loss and evaluation."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memgen import LoRAConfig, MemGenConfig, WeaverConfig
from thoughtbubbles import Architecture
from train.cli.config_json import as_json
from train.data import Batch
from train.data.chat_data import (
    ChatData,
    ChatDataConfig,
    ChatReader,
    one_response,
    prepare_chat,
)
from train.devices.mesh import (
    batch_sharding,
    check_auto,
    check_batch,
    make_mesh,
    place,
    put,
    replicated,
)
from train.engine.config import LoopConfig
from train.engine.memory import check_row_memory, training_memory
from train.engine.optim import OptimizerConfig
from train.engine.state import Trainable, TrainState, make_trainable
from train.engine.step import Loss, TrainStep, make_train_step
from train.finetuning.battery import (
    BatteryConfig,
    battery_metrics,
    play_battery,
    readable_battery,
)
from train.finetuning.divergence import reference_kl
from train.models.finetunable import TRAINED, FinetunableModel
from train.models.load import (
    LanguageModel,
    boundaries_for,
    checksum,
    load_language_model_on,
    tokenizer_meta,
)
from train.rl.learning.policy import sampler_of
from train.runs.resume import FREE

ROWS = ("tokens", "loss_mask", "segment")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(LoopConfig):
    """Config of supervised fine-tuning; only the assistant's tokens are targets of the loss.

    Attributes:
        weights: Model to start from: a run folder, "smollm2", a Hugging Face folder, or a .gguf
            file.
        train: Parameters that are trained: "all" (tracked thresholds keep their values), a "lora"
            adapter, or a "weaver" of latent memory. With "lora" and "weaver" the decoder is frozen,
            and checkpoints hold only the trained parameters.
        lora: Options of the adapter that `train="lora"` trains.
        memgen: Options of latent memory for `train="weaver"`: the weaver, and where memory is
            written.
        boundaries: Rule that selects the tokens after which memory may be written
            (`memgen.boundary_table`).
        data: Conversations, row length and packing.
        kl: Coefficient of a penalty on KL(π ‖ π_ref), the divergence from the model that tuning
            begins with, computed exactly over the vocabulary and averaged over the targets. If it
            is above 0, a copy of the trained parameters' initial values stays in memory.
        battery: Battery of variants that is played at each evaluation, with the metrics
            `eval/battery/VARIANT/success`, `/validity` and `/cut`; none is played without a `task`.
    """

    weights: str = "smollm2"
    train: Literal["all", "lora", "weaver"] = "lora"
    lora: LoRAConfig = LoRAConfig()
    memgen: MemGenConfig = MemGenConfig(WeaverConfig())
    boundaries: Literal["suffix", "exact_id", "sentence"] = "suffix"
    data: ChatDataConfig = ChatDataConfig()
    kl: float = 0.0
    battery: BatteryConfig = dataclasses.field(default=BatteryConfig(), metadata=FREE)
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3, weight_decay=0.0)
    out: str = dataclasses.field(default="runs/sft", metadata=FREE)

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.kl < math.inf:
            raise ValueError(f"kl={self.kl}: choose 0 or more")


class SFTJob:
    """Training job of supervised fine-tuning for `train.engine.loop.run` (see `TrainingJob`).

    Args:
        config: Config of the run.

    Raises:
        ValueError: An option is wrong, or the model to start from does not suit the options.
    """

    def __init__(self, config: SFTConfig):
        self.config = config
        self.mesh = mesh = make_mesh(config.mesh)
        check_batch(config.batch_size, config.accumulate, mesh)
        if not config.dry_run:
            check_row_memory(config.batch_size, config.data.seq_len)
        self._lm: LanguageModel = load_language_model_on(mesh, config.weights)
        if config.data.end_token is not None:
            self._lm = self._lm.with_stop_token(config.data.end_token)
        model = self._lm.model
        if self._lm.memgen is not None:
            raise ValueError(
                f"{config.weights} holds a weaver, which fine-tuning would drop: begin with the "
                "weights that it was trained with"
            )
        if config.train == "weaver" and config.memgen.trigger is not None:
            raise ValueError("memgen.trigger: only the weaver is trained here: leave it out")
        if config.data.pack and (config.train == "weaver" or not model.takes_positions):
            why = "a weaver" if config.train == "weaver" else type(model).__name__
            why = "a model that forks" if model.fork_policy is not None else why
            raise ValueError(
                f"data.pack=True: {why} reads rows of one conversation: leave data.pack out"
            )
        if config.kl and config.train == "weaver":
            raise ValueError(
                f"kl={config.kl} is of a decoder's own predictions, train='weaver' changes them by "
                "memory: choose all or lora"
            )
        if config.battery.task:
            self._check_battery()
        self.keeps_frozen = config.train == "all"
        self._boundary = boundaries_for(self._lm, config.train, config.boundaries)
        self.trainable = make_trainable(
            model.config,
            config.optimizer,
            config.steps,
            mesh,
            config.seed,
            config.attention,
            TRAINED[config.train],
            self._around,
        )
        self.seq_len = config.data.seq_len
        self._memory = training_memory(
            self.trainable, config.batch_size, self.seq_len, copies=config.kl > 0
        )
        if not config.dry_run:  # a dry run may describe a run on another machine
            self._memory.check()
        # A frozen decoder needs no gradients of its parameters: two matrix products, not three.
        products, passes, length = 3 if config.train == "all" else 2, 1, self.seq_len
        if config.train == "weaver":
            length += config.memgen.max_latents
            passes = 1 + self._weaving(length)
        flops = model.config.forward_flops(length)
        self.step_flops = round(products * passes * config.batch_size * flops)
        # Checksum of parameters that checkpoints lack: a run must be resumed with the same values.
        self._base = None if self.keeps_frozen and not config.kl else checksum(model)
        self._score = jax.jit(
            self._scores,
            in_shardings=(self.trainable.shardings.variables, batch_sharding(mesh)),
            out_shardings=replicated(mesh),
        )

    def _weaving(self, length: int) -> float:
        """Return the weaver's maximum number of input vectors per row, divided by `length`."""
        config, trainable = self.config, self.trainable
        made = nnx.merge(trainable.graphdef, trainable.abstract.variables).memgen
        if not made.config.weaver.latents_see_latents:
            return 1
        rows = config.batch_size // config.accumulate
        sizes = rows, self.seq_len + 1, made.config.events
        schedule = made.schedule(sizes, dropout=True)
        return schedule.rounds * schedule.size / length if schedule else made.config.events

    def _check_battery(self) -> None:
        """Raise a ValueError if the battery can't be played by this model, mesh and process."""
        self.config.battery.environments()
        self._lm.model.check_cacheable()
        check_auto(self.mesh, "a battery")
        if jax.process_count() > 1:
            raise ValueError(
                f"battery.task={self.config.battery.task} is played in one process, here are "
                f"{jax.process_count()}: leave it out, and call thoughtbubbles battery afterwards"
            )

    def _around(self, model: Architecture) -> FinetunableModel:
        config = self.config
        return FinetunableModel(
            model,
            config.train,
            lora=config.lora,
            memgen=config.memgen,
            boundary=self._boundary,
            rngs=nnx.Rngs(config.seed),
        )

    @property
    def meta(self) -> dict[str, Any]:
        """Metadata that `train.models.load` needs to read a checkpoint, besides the config."""
        meta = {"base": self._base, "model": as_json(self.trainable.config)}
        return meta | tokenizer_meta(self._lm.tokenizer)

    def prepare(self) -> ChatData:
        data = prepare_chat(self.config.data, self._lm.tokenizer)
        return one_response(data) if self.config.train == "weaver" else data

    def reader(self, data: ChatData, local_rows: np.ndarray | None) -> ChatReader:
        return ChatReader(data.train, self.config.batch_size, self.config.data.seed, local_rows)

    def inputs(self, batch: Batch) -> Any:
        names = (*ROWS, "position") if self.config.data.pack else ROWS
        return {name: batch[name] for name in names}

    def train_step(self) -> TrainStep:
        accumulate, kl = self.config.accumulate, self.config.kl
        if not kl:
            return make_train_step(self.trainable, accumulate, sft_loss)
        # Copies: training overwrites the variables that it begins with.
        variables = jax.tree.map(lambda leaf: leaf.copy(), nnx.state(self._around(self._lm.model)))
        reference = self.trainable.abstract.with_variables(variables).params
        reference = put(reference, self.trainable.shardings.params)
        loss = penalised_loss(self.trainable, kl)
        return make_train_step(self.trainable, accumulate, loss, (reference,))

    def observe(self, sums: Mapping[str, Any]) -> None:
        pass

    def step_metrics(
        self, sums: Mapping[str, Any], step: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the metric `ref_kl`, the mean divergence in nats, if `config.kl` is not 0."""
        if not self.config.kl:
            return {}, {}
        return {"ref_kl": float(sums["ref_kl"]) / max(float(sums["tokens"]), 1.0)}, {}

    def progress(self, step: int) -> str:
        return ""

    def first_state(self) -> TrainState:
        """Make the state of step 0: the loaded model, and a newly initialised adapter or weaver."""
        return self.trainable.start(nnx.state(self._around(self._lm.model)))

    def evaluate(self, state: TrainState, data: ChatData) -> dict[str, float]:
        """Score held-out rows, and play the battery.

        Returns:
            Mapping from names to metrics: `loss` in nats per supervised token; `perplexity`;
            `standard_error` of `loss` as an estimate for all rows, unless only one row is scored;
            and the metrics of the battery.
        """
        nats, count = [], []
        size = self.config.batch_size // self.config.accumulate
        for batch in data.validation.batches(size, self.config.evaluation.rows or None):
            inputs = jax.tree.map(lambda rows: place(rows, self.trainable.mesh), self.inputs(batch))
            scores = jax.device_get(self._score(state.variables, inputs))
            real = batch["rows"] >= 0
            nats.append(scores["nats"][real])
            count.append(scores["count"][real])
        nats, count = np.concatenate(nats), np.concatenate(count)
        loss = float(nats.sum() / count.sum())
        found = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if len(nats) > 1:
            left = 1 - len(nats) / len(data.validation)  # no error where all rows are scored
            spread = (nats - loss * count).std(ddof=1) * math.sqrt(left)
            found["standard_error"] = float(spread * math.sqrt(len(nats)) / count.sum())
        if self.config.battery.task:
            policy = sampler_of(self.trainable.model(state.variables))
            scores = play_battery(policy, self._lm, self.config.battery, self.mesh)
            found |= battery_metrics(scores)
        return found

    def _scores(self, variables: Any, rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
        log_probs = self.trainable.model(variables).log_probs(rows)
        return {
            "nats": -log_probs.sum(axis=1),
            "count": rows["loss_mask"][:, 1:].sum(axis=1, dtype=jnp.float32),
        }

    def readable(self, held_out: dict[str, float]) -> str:
        error = held_out.get("standard_error")
        spread = "" if error is None else f" ± {error:.4f}"
        # A policy that looks at the whole row has seen what it predicts: say so.
        note = "" if self.trainable.config.causal else " (teacher-forced, not causal)"
        return (
            f"held-out loss {held_out['loss']:.4f}{spread} nats per supervised token, perplexity "
            f"{held_out['perplexity']:.2f}{note}{readable_battery(held_out)}"
        )

    def describe(self, start: int) -> str:
        trainable, config = self.trainable, self.config
        frozen = "" if self._base is None else f", frozen weights {self._base[:12]}"
        sizes = " x ".join(f"{name} {size}" for name, size in trainable.mesh.shape.items())
        return (
            f"{config.weights}: {trainable.config.num_params():,} parameters; trained are "
            f"{trainable.num_trained:,} ({config.train}){frozen}; attention "
            f"{trainable.attention}; {sizes}; steps {start} to {config.steps}; memory "
            f"{self._memory}"
        )


def sft_loss(
    finetunable: FinetunableModel, rows: dict[str, jax.Array], key: jax.Array
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Compute the `train.engine.step.Loss` of chat rows: nats summed over the supervised tokens.

    The train step divides the sum by the number of supervised tokens of the whole batch.
    """
    log_probs = finetunable.log_probs(rows, key)
    return -log_probs.sum(), rows["loss_mask"][:, 1:].sum(dtype=jnp.float32), {}


def penalised_loss(trainable: Trainable, kl: float) -> Loss:
    """Make a loss: `sft_loss` plus a penalty on the divergence from a reference model.

    Args:
        trainable: Static side of the run. The reference model shares the run's frozen parameters.
        kl: Coefficient of the penalty.

    Returns:
        Loss function with one more argument after its key: an nnx.State with the reference model's
        values of the trained parameters.
    """

    def loss(
        finetunable: FinetunableModel, rows: dict[str, jax.Array], key: jax.Array, params: Any
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        state = trainable.abstract.with_variables(nnx.state(finetunable))
        reference = trainable.model(dataclasses.replace(state, params=params).variables)
        divergence, log_probs = reference_kl(finetunable, reference, rows, key)
        tokens = rows["loss_mask"][:, 1:].sum(dtype=jnp.float32)
        total = -log_probs.sum() + kl * divergence.sum()
        return total, tokens, {"ref_kl": divergence.sum(), "tokens": tokens}

    return loss
