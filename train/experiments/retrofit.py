"""Compare further training of a pretrained model with added fork layers and without.

python -m train.experiments.retrofit --out docs/quality/retrofit.jsonl
python -m train.experiments.retrofit --report docs/quality/retrofit.jsonl

Each finished run (task, steps, variant and seed) is one line of the file, where the task is the
name of the pretrained weights; a second call trains only the missing runs.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from thoughtbubbles import Policy, PrefixRank
from thoughtbubbles.forking import GATE_UNIT
from thoughtbubbles.pretrained import Pretrained, load_pretrained
from thoughtbubbles.retrofit import add_forks
from thoughtbubbles.statistics import readable as fork_metrics
from train.benchmarks.timing import Clock
from train.cli.command import run_command
from train.data import DataConfig, PackedData, TrainReader, prepare
from train.devices.mesh import MeshConfig, make_mesh, place
from train.engine.config import EvalConfig
from train.engine.optim import OptimizerConfig
from train.engine.state import make_trainable
from train.engine.step import make_train_step
from train.evaluation.held_out import Evaluator
from train.experiments.quality import KEY, report
from train.experiments.study import INDEX, Result, Results, StudyConfig, check_names, run_study
from train.models.load import find_weights, keep_tokenizer
from train.pretraining.job import TRAINED

SETTINGS = ("weights", "layers", "policy", "batch_size", "seq_len", "optimizer", "rows")
"""Options that all results of a file must share."""

# Mapping from a variant to whether the model forks, and the filter of the trained parameters.
VARIANTS = {
    "plain": (False, TRAINED["all"]),
    "forks_only": (True, TRAINED["forks"]),
    "forks_and_all": (True, TRAINED["all"]),
}


@dataclasses.dataclass(frozen=True)
class Retrofit(StudyConfig):
    """Trains pretrained weights further, with and without forks, or reports stored results.

    Attributes:
        weights: Pretrained weights: "smollm2", a Hugging Face folder, or a .gguf file.
        layers: Indices of the blocks in front of which fork layers are added.
        policy: Causal policy of the fork layers.
        variants: Variants to train: "plain" has no forks, "forks_only" trains only the fork layers,
            and "forks_and_all" trains fork layers and all other parameters.
        steps: Number of training steps.
        batch_size: Number of rows in a step, the same rows for all variants.
        seq_len: Number of tokens in a row.
        optimizer: Optimizer of all variants.
        rows: Number of held-out rows, the same rows for all variants.

    Raises:
        ValueError: A variant is unknown, the policy is not causal, a number is too small, or a list
            is empty.
    """

    weights: str = "smollm2"
    layers: tuple[int, ...] = dataclasses.field(default=(10, 20), metadata=INDEX)
    policy: Policy = PrefixRank(1.5)
    variants: tuple[str, ...] = tuple(VARIANTS)
    seeds: tuple[int, ...] = (0, 1)
    steps: int = 40
    batch_size: int = 4
    seq_len: int = 128
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=1e-4, weight_decay=0.0, warmup=0.1, fork_rate=10.0
    )
    rows: int = 32
    out: str = "retrofit.jsonl"

    def __post_init__(self):
        super().__post_init__()
        check_names("variant", self.variants, VARIANTS)
        if not self.policy.causal:
            raise ValueError(f"{self.policy} is not causal: choose PrefixRank(...) or Threshold")


def main(config: Retrofit) -> None:
    """Train the variants that the file of results lacks, or print the tables."""
    run_study(config, KEY, train_missing, report, SETTINGS)


def train_missing(config: Retrofit, results: Results) -> Iterator[tuple[Result, str]]:
    """Train the runs that `results` lacks, and yield the result of each with a line to print.

    Raises:
        ValueError: The pretrained weights do not exist.
    """
    runs = results.missing(
        {"task": Path(config.weights).name, "variant": variant, "seed": seed, "steps": config.steps}
        for seed in config.seeds
        for variant in config.variants
    )
    if not runs:
        return
    pretrained = load_pretrained(find_weights(config.weights))
    data = prepare_data(pretrained, config.seq_len)
    for run in runs:
        variant, seed = run["variant"], run["seed"]
        result = run | train_and_score(config, pretrained, data, variant, seed)
        yield (
            result,
            (
                f"{variant} seed {seed}: {result['loss_before']:.4f} to {result['loss']:.4f} "
                f"nats, {result['cpu_seconds']:.0f} CPU seconds"
            ),
        )


def prepare_data(pretrained: Pretrained, seq_len: int) -> PackedData:
    """Prepare the standard library's source with the whole tokenizer of the pretrained model."""
    data = DataConfig(seq_len=seq_len)
    name = keep_tokenizer(pretrained.tokenizer, data)
    return prepare(dataclasses.replace(data, tokenizer=name))


def train_and_score(
    config: Retrofit, pretrained: Pretrained, data: PackedData, variant: str, seed: int
) -> Result:
    """Train one variant from pretrained parameters, and score it before and after training.

    Args:
        config: Options of the experiment.
        pretrained: Pretrained config, parameters and tokenizer.
        data: Prepared rows.
        variant: Name of the variant, a key of `VARIANTS`.
        seed: Seed of the fork layers' parameters and of the order of rows.

    Returns:
        Entries of a result: the numbers of training `tokens`, of `parameters` and of
        `trained_parameters`; the held-out scores of `Evaluator` after training, and `loss_before`,
        the held-out loss before training; `training_loss`, a list over steps; metrics of each fork
        layer in the last training batch (`fork_L/...`) and `gates`, the factor on the scores of
        forks in each fork layer; `step_ms`, the median time of a step in ms; `seconds` and
        `cpu_seconds`, the time of training and both evaluations with compilation; and the version
        of `jax`.
    """
    forked, trained = VARIANTS[variant]
    model, weights = pretrained.config, pretrained.params
    if forked:
        model, weights = add_forks(
            model, weights, layers=config.layers, policy=config.policy, seed=seed
        )
    mesh = make_mesh(MeshConfig())
    trainable = make_trainable(model, config.optimizer, config.steps, mesh, trained=trained)
    # A copy: training overwrites the arrays that it is given.
    state = trainable.init_from(jax.tree.map(np.array, weights))
    evaluator = Evaluator(trainable, config.batch_size, EvalConfig(rows=config.rows))
    clock = Clock()
    before = evaluator(state.variables, data.validation)
    step, reader = make_train_step(trainable), TrainReader(data.train, config.batch_size, seed)
    metrics, losses, step_ms = {}, [], []
    for number in range(config.steps):
        step_clock = Clock()
        tokens = place(reader.batch(number)["tokens"], mesh)
        state, metrics = step(state, tokens)
        losses.append(float(metrics["loss"]))
        step_ms.append(1e3 * step_clock.read().seconds)
        if number % 10 == 0:
            print(f"{variant} seed {seed} step {number}: {losses[-1]:.4f}", flush=True)
    scores = evaluator(state.variables, data.validation)
    forks = fork_metrics(jax.device_get(metrics["aux"]), model.fork_layers)
    layers = nnx.to_pure_dict(state.variables).get("forks", {})
    cost = clock.read()
    return {
        "tokens": config.steps * config.batch_size * config.seq_len,
        "parameters": model.num_params(),
        "trained_parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        **scores,
        "loss_before": before["loss"],
        "training_loss": losses,
        **{name: value for name, value in forks.items() if not name.endswith("histogram")},
        "gates": [float(GATE_UNIT * abs(fork["gate"])) for fork in layers.values()],
        "step_ms": float(np.median(step_ms)),
        "seconds": cost.seconds,
        "cpu_seconds": cost.cpu_seconds,
        "jax": jax.__version__,
    }


def command() -> None:
    run_command(main, Retrofit)


if __name__ == "__main__":
    command()
