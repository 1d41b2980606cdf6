"""Compare a Dragon Hatchling with a plain decoder of as many parameters, over several seeds.

python -m train.experiments.hatchling_quality --out hatchling_quality.jsonl
python -m train.experiments.hatchling_quality --report hatchling_quality.jsonl

For a given seed, all arms read the same rows of bytes of the standard library's source in the same
order. All arms use the same optimizer, whose learning rate is tuned for none of them, and have
about as many parameters as the plain decoder. A Hatchling shares its parameters between all layers,
so that it spends several times the plain decoder's FLOPs and time on the same tokens. Therefore the
arms `plain_flops` and `plain_time` train the plain decoder on more rows, for as many FLOPs or as
much CPU time as the Hatchling. Each finished run (arm, seed and options) is one line of the file; a
second call trains only the missing runs.
"""

import dataclasses
import datetime
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from thoughtbubbles import ModelConfig, PrefixRank
from thoughtbubbles.architecture import ArchitectureConfig, architecture_of
from thoughtbubbles.hatchling import ForkingHatchlingConfig, HatchlingConfig
from train.benchmarks.timing import Clock, Cost, interleaved
from train.cli.command import run_command
from train.data import DataConfig, PackedData, TrainReader, prepare
from train.devices.mesh import MeshConfig, make_mesh, place
from train.engine.config import EvalConfig
from train.engine.optim import OptimizerConfig
from train.engine.state import make_trainable
from train.engine.step import make_train_step
from train.evaluation.held_out import Evaluator
from train.experiments.study import (
    Result,
    Results,
    StudyConfig,
    by_key,
    check_names,
    markdown_table,
    mean_text,
    run_study,
    seeds_text,
)

SIZES = ("embed_dim", "num_layers", "num_heads", "batch_size", "seq_len", "rows")
SETTING = ("steps", *SIZES, "optimizer")  # the report has one table for each combination
KEY = ("arm", "seed", *SETTING)
VOCAB = 320  # the 257 ids of bytes and separator, padded to a multiple of 64
PLAIN = "plain"  # baseline, with which the report compares all arms


@dataclasses.dataclass(frozen=True)
class HatchlingQuality(StudyConfig):
    """Trains Dragon Hatchlings and decoders of as many parameters, or reports stored results.

    Attributes:
        arms: Arms to train: "plain" (the decoder) and "hatchling"; the same two models with one
            fork layer, called "forking" and "forking_hatchling"; and longer training of the plain
            decoder, called "plain_flops" and "plain_time".
        embed_dim: Width of all models (d).
        num_layers: Number of layers of the decoder, and number of times that the Hatchling applies
            its single layer.
        num_heads: Number of attention heads.
        steps: Number of training steps. The arms "plain_flops" and "plain_time" take more steps, to
            spend as many FLOPs or as much CPU time as the arm "hatchling".
        batch_size: Number of rows in a step.
        seq_len: Number of tokens in a row.
        rows: Number of held-out rows, the same rows for all arms.
        optimizer: Optimizer of all arms.

    Raises:
        ValueError: An arm is unknown, a number is too small, or sizes do not fit together.
    """

    arms: tuple[str, ...] = (
        PLAIN, "hatchling", "forking", "forking_hatchling", "plain_flops", "plain_time"
    )  # fmt: skip
    embed_dim: int = 64
    num_layers: int = 4
    num_heads: int = 4
    steps: int = 2500
    batch_size: int = 16
    seq_len: int = 128
    rows: int = 512
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-3)
    out: str = "hatchling_quality.jsonl"

    def __post_init__(self):
        super().__post_init__()
        check_names("arm", self.arms, ARMS)
        for name in self.arms:
            ARMS[name](self)  # sizes that do not fit together are refused before hours of work


def plain(config: HatchlingQuality) -> ModelConfig:
    """Return the config of the plain decoder."""
    return ModelConfig(
        vocab_size=VOCAB,
        embed_dim=config.embed_dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        tied_head=False,
    )


def hatchling(config: HatchlingQuality) -> HatchlingConfig:
    """Return the config of the Hatchling with about as many parameters as the plain decoder."""
    step = 2 * config.num_heads
    shape = HatchlingConfig(
        vocab_size=VOCAB,
        embed_dim=config.embed_dim,
        num_neurons=step,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        remat="none",  # as the plain decoder's
    )
    missing = plain(config).num_params() - shape.num_params()
    more = max(round(missing / (3 * config.embed_dim * step)), 0)
    return dataclasses.replace(shape, num_neurons=step * (1 + more))


def forking(config: HatchlingQuality) -> ModelConfig:
    """Return the plain decoder's config with one fork layer, up to two streams per token.

    The fork layer is in front of the block with index `num_layers // 2`.
    """
    layer = config.num_layers // 2
    return dataclasses.replace(plain(config), fork_layers=(layer,), policy=PrefixRank(2.0))


def forking_hatchling(config: HatchlingQuality) -> ForkingHatchlingConfig:
    """Return the Hatchling's config with one fork layer, up to two streams per token.

    The fork layer is in front of application `num_layers // 2` of the layer, counted from 0.
    """
    fields = dataclasses.asdict(hatchling(config))
    layer = config.num_layers // 2
    return ForkingHatchlingConfig(**fields, fork_layers=(layer,), policy=PrefixRank(2.0))


ARMS: dict[str, Callable[[HatchlingQuality], Any]] = {
    PLAIN: plain,
    "hatchling": hatchling,
    "forking": forking,
    "forking_hatchling": forking_hatchling,
    "plain_flops": plain,
    "plain_time": plain,
}


def steps_of(config: HatchlingQuality, arm: str) -> int:
    """Return the number of training steps of an arm.

    The arm `plain_flops` spends as many FLOPs as the arm `hatchling`, and `plain_time` as much CPU
    time. For `plain_time`, the call measures the CPU time of a step of both models, so that the
    number of steps depends on the machine.
    """
    if arm == "plain_flops":
        spent = hatchling(config).forward_flops(config.seq_len)
        return round(config.steps * spent / plain(config).forward_flops(config.seq_len))
    if arm == "plain_time":
        costs = interleaved({name: _steps(config, name) for name in (PLAIN, "hatchling")}, 5)
        seconds = {name: timing.best.cpu_seconds for name, timing in costs.items()}
        return round(config.steps * seconds["hatchling"] / seconds[PLAIN])
    return config.steps


def _steps(config: HatchlingQuality, arm: str, count: int = 4) -> Callable[[], Cost]:
    """Return a function that trains an arm for `count` more steps and returns their cost."""
    shape: ArchitectureConfig = ARMS[arm](config)
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    trainable = make_trainable(shape, config.optimizer, config.steps, mesh, 0)
    step, state = make_train_step(trainable), trainable.init()
    tokens = place(np.ones((config.batch_size, config.seq_len + 1), np.int32), mesh)

    def run() -> Cost:
        nonlocal state
        clock = Clock()
        for _ in range(count):
            state, _metrics = step(state, tokens)
        jax.block_until_ready(state.params)
        return clock.read()

    return run


def main(config: HatchlingQuality) -> None:
    """Train the arms that the file of results lacks, or print the tables."""
    run_study(config, KEY, train_missing, report)


def train_missing(config: HatchlingQuality, results: Results) -> Iterator[tuple[Result, str]]:
    """Train the runs that `results` lacks, and yield the result of each with a line to print."""
    fixed = {name: getattr(config, name) for name in ("steps", *SIZES)}
    options = dataclasses.asdict(config.optimizer).items()
    fixed |= {"optimizer": ", ".join(f"{name} {value}" for name, value in options)}
    runs = results.missing(
        fixed | {"arm": arm, "seed": seed} for seed in config.seeds for arm in config.arms
    )
    data = prepare(DataConfig(seq_len=config.seq_len)) if runs else None
    for run in runs:
        assert data is not None
        clock = Clock()
        result = run | train_and_score(config, data, run["arm"], run["seed"])
        cost = clock.read()
        result |= {"seconds": cost.seconds, "cpu_seconds": cost.cpu_seconds}
        result |= {"date": datetime.date.today().isoformat(), "jax": jax.__version__}
        yield (
            result,
            f"{run['arm']} seed {run['seed']}: {result['loss']:.4f} ± "
            f"{result['standard_error']:.4f} nats, {result['cpu_seconds']:.0f} CPU seconds",
        )


def train_and_score(config: HatchlingQuality, data: PackedData, arm: str, seed: int) -> Result:
    """Train an arm from random initial parameters, and score the trained model.

    Args:
        config: Options of the experiment.
        data: Prepared rows.
        arm: Name of the arm, a key of `ARMS`.
        seed: Seed of parameters and of the order of rows.

    Returns:
        Entries of a result: the numbers of training `tokens` and of `parameters`; `teraflops`, the
        cost of the whole training in 10^12 FLOPs, where a step counts as three forward passes;
        `step_cpu_ms`, the mean CPU time of a step in ms, without the first step; `last_train_loss`,
        the loss of the last training batch; the held-out scores of `Evaluator`; and `active`, a
        mapping from `layer_L/x_active` and `layer_L/y_active` to the fraction of active neurons in
        the last training batch, empty for a model without neurons.
    """
    shape: ArchitectureConfig = ARMS[arm](config)
    steps = steps_of(config, arm)
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    trainable = make_trainable(shape, config.optimizer, steps, mesh, seed)
    step, state = make_train_step(trainable), trainable.init()
    reader = TrainReader(data.train, config.batch_size, seed)
    after_first = Clock()
    metrics: dict[str, Any] = {}
    for number in range(steps):
        state, metrics = step(state, place(reader.batch(number)["tokens"], mesh))
        if number == 0:
            jax.block_until_ready(metrics["loss"])
            after_first = Clock()
    jax.block_until_ready(state.params)
    cost = after_first.read()
    scores = Evaluator(trainable, 64, EvalConfig(rows=config.rows))(
        state.variables, data.validation
    )
    of_step = architecture_of(shape).step_metrics(shape, jax.device_get(metrics["aux"]))
    tokens = steps * config.batch_size * config.seq_len
    return {
        "tokens": tokens,
        "parameters": shape.num_params(),
        "teraflops": 3 * steps * config.batch_size * shape.forward_flops(config.seq_len) / 1e12,
        "step_cpu_ms": 1e3 * cost.cpu_seconds / max(steps - 1, 1),
        "last_train_loss": float(metrics["loss"]),
        **scores,
        "active": {name: value for name, value in of_step.items() if name.endswith("_active")},
    }


def report(results: list[Result]) -> str:
    """Format a Markdown table for each combination of `SETTING`, with a row for each arm.

    Losses are means over seeds ± standard errors. The column "minus plain" has the mean over seeds
    of an arm's loss minus the loss of the arm `plain` with the same seed; seeds without a run of
    `plain` are left out.
    """
    lines = []
    for (steps, *sizes, optimizer), runs in by_key(results, *SETTING).items():
        shown = ", ".join(f"{name} {size}" for name, size in zip(SIZES, sizes, strict=True))
        lines += [f"{steps:,} steps, {shown}; held-out nats per token", ""]
        lines += [f"optimizer: {optimizer}", ""]
        losses = {run["seed"]: run["loss"] for run in runs if run["arm"] == PLAIN}
        rows = []
        for (arm,), of_arm in by_key(runs, "arm").items():
            paired = [r["loss"] - losses[r["seed"]] for r in of_arm if r["seed"] in losses]
            rows.append(
                (
                    arm,
                    f"{of_arm[0]['parameters']:,}",
                    f"{np.mean([run['tokens'] for run in of_arm]):,.0f}",
                    f"{np.mean([run['teraflops'] for run in of_arm]):,.1f}",
                    seeds_text(sorted(of_arm, key=lambda run: run["seed"])),
                    mean_text([run["loss"] for run in of_arm], 4),
                    mean_text(paired, 4, "+") if arm != PLAIN else "",
                    _active(of_arm, "x"),
                    _active(of_arm, "y"),
                    f"{np.median([run['cpu_seconds'] for run in of_arm]):,.0f}",
                )
            )
        head = ("arm", "parameters", "tokens", "TFLOPs", "seeds", "loss", "minus plain")
        lines += [*markdown_table((*head, "x active", "y active", "CPU s"), rows), ""]
    return "\n".join(lines)


def _active(runs: list[Result], kind: str) -> str:
    """Format the fraction of active neurons in the first and last layer, averaged over seeds."""
    layers = [name for name in runs[0]["active"] if name.endswith(f"/{kind}_active")]
    if not layers:
        return ""
    shares = [np.mean([run["active"][name] for run in runs]) for name in (layers[0], layers[-1])]
    return " to ".join(f"{share:.1%}" for share in shares)


def command() -> None:
    run_command(main, HatchlingQuality)


if __name__ == "__main__":
    command()
