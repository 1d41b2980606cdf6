"""Benchmark a train step beside nanodo's (plain) and fork-xla's (with forks)."""

import dataclasses
import importlib
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from thoughtbubbles import ModelConfig, PrefixRank
from train.benchmarks.models import ModelSizes, random_model, random_tokens
from train.benchmarks.timing import Cost, check_cpu, interleaved, timed

Loss = Callable[[Any, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BesideTraining(ModelSizes):
    """Benchmark of a train step beside another library's model of the same sizes.

    Both steps compute the mean loss of the same rows and its gradient in float32, and update the
    parameters by the same `optax.adamw`. For times of one thread, run the command under
    `taskset -c 0`.

    Attributes:
        source: Folder of a clone of the other library.
        vocab_size: Number of token ids.
        seq_len: Number of tokens per row.
        batch_size: Number of rows per batch.
        repeats: Number of rounds; in each round both steps are timed in turns. The smallest time is
            reported.
    """

    source: Path
    vocab_size: int = 1024
    seq_len: int = 128
    batch_size: int = 8
    repeats: int = 5

    def __post_init__(self):
        if min(self.vocab_size, self.seq_len, self.batch_size, self.repeats) < 1:
            raise ValueError("vocab_size, seq_len, batch_size and repeats must be 1 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForkXLABenchmark(BesideTraining):
    """Benchmark of a train step with forks beside fork-xla's, in front of every second block.

    Both steps compute the mean loss of the same rows and its gradient in float32, and update the
    parameters by the same `optax.adamw`. fork-xla's model is changed as it is read: it computes in
    float32 in place of bfloat16, and an argument that JAX has renamed gets its new name. For times
    of one thread, run the command under `taskset -c 0`.

    Attributes:
        ratio: Streams per token after the fork layers: `PrefixRank(ratio)` here, the paper's top-k
            there.
    """

    ratio: float = 2.0


def beside_nanodo(config: BesideTraining) -> None:
    """Time a plain train step beside the one of nanodo's `TransformerDo`, which has no RoPE."""
    _file(config.source, "nanodo/model.py")
    with mock.patch.object(sys, "path", [str(config.source.expanduser()), *sys.path]):
        nanodo = importlib.import_module("nanodo.model")
    sizes = nanodo.DoConfig(
        D=config.embed_dim,
        H=config.num_heads,
        L=config.seq_len,
        N=config.num_layers,
        V=config.vocab_size,
        F=4 * config.embed_dim,
        fsdp_enabled=False,
    )
    model = nanodo.TransformerDo(sizes)

    def loss(params: Any, rows: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, rows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()

    compare(config, config.model_config(config.vocab_size, fork_layers=()), "nanodo", model, loss)


def beside_fork_xla(config: ForkXLABenchmark) -> None:
    """Time a train step with forks beside the one of fork-xla's `Thoughtbubbles`."""
    text = _file(config.source, "model.py").read_text(encoding="utf-8")
    module = types.ModuleType("fork_xla_model")
    # What it imports for logs and plots is not called here.
    missing: dict[str, Any] = {
        "loguru": types.SimpleNamespace(logger=None), "utils": types.SimpleNamespace(plot=None)
    }  # fmt: skip
    text = text.replace("bfloat16", "float32").replace("a_min=", "min=")
    with mock.patch.dict(sys.modules, {**missing, module.__name__: module}):
        exec(compile(text, "model.py", "exec"), vars(module))
    depth = config.num_layers
    forks = tuple(range(1, depth, 2))
    sizes = types.SimpleNamespace(
        vocab_size=config.vocab_size,
        block_size=config.seq_len,
        max_block_size=round(config.ratio * config.seq_len),
        n_head=config.num_heads,
        n_embd=config.embed_dim,
        dropout=0.0,
        bias=True,
        plan=["fork" if index in forks else "regular" for index in range(depth)],
        averaging_method="residual",
    )
    model = module.Thoughtbubbles(sizes)

    def loss(params: Any, rows: jax.Array) -> jax.Array:
        return model.apply({"params": params}, rows[:, :-1], rows[:, 1:], deterministic=True)[1]

    mine = config.model_config(
        config.vocab_size, fork_layers=forks, policy=PrefixRank(config.ratio), merge="residual"
    )
    compare(config, mine, "fork-xla", model, loss)


def compare(
    config: BesideTraining, mine: ModelConfig, name: str, theirs: Any, their_loss: Loss
) -> None:
    """Time both steps in turns, and print a line for each.

    Args:
        config: Sizes and rounds.
        mine: Config of this library's model.
        name: Name of the other library.
        theirs: Linen module of the other library, which takes tokens `[B, T]`.
        their_loss: Mean loss in nats of its parameters and of rows `[B, T + 1]`.
    """
    check_cpu()
    rows = jnp.asarray(random_tokens(config.vocab_size, config.batch_size, config.seq_len + 1))
    definition, params = nnx.split(random_model(mine))

    def our_loss(params: Any, rows: jax.Array) -> jax.Array:
        total, count, _ = nnx.merge(definition, params).loss(rows)
        return total / count

    made = jax.jit(theirs.init)(jax.random.key(0), rows[:, :-1])["params"]
    made = jax.tree.map(lambda leaf: getattr(leaf, "value", leaf), made, is_leaf=_is_boxed)
    steps = {"ours": _step(our_loss, params, rows), name: _step(their_loss, made, rows)}
    counts = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, made)]
    timing = interleaved(steps, config.repeats)
    best = [timing[which].best.cpu_seconds for which in steps]
    print(
        f"float32, {config.batch_size} x {config.seq_len} tokens, d={config.embed_dim}, "
        f"{config.num_layers} layers, vocabulary {config.vocab_size}; CPU time of a train step, "
        f"best of {config.repeats}"
    )
    for which, count, seconds in zip(steps, counts, best, strict=True):
        print(f"{which:10} {1e3 * seconds:9.1f} ms   {count:,} parameters")
    print(f"ours is {best[1] / best[0]:.2f} times as fast")


def _step(loss: Loss, params: Any, rows: jax.Array) -> Callable[[], Cost]:
    """Make a function that updates parameters in place by one step, and returns its cost."""
    optimizer = optax.adamw(1e-4)

    @partial(jax.jit, donate_argnums=0)
    def step(state: Any, rows: jax.Array) -> tuple[Any, jax.Array]:
        params, moments = state
        nats, slope = jax.value_and_grad(loss)(params, rows)
        updates, moments = optimizer.update(slope, moments, params)
        return (optax.apply_updates(params, updates), moments), nats

    holder: list[Any] = [(params, optimizer.init(params))]

    def run() -> jax.Array:
        holder[0], nats = step(holder[0], rows)
        if not np.isfinite(nats):
            raise ValueError(f"the loss is {float(nats)}")
        return nats

    return lambda: timed(run)


def _is_boxed(leaf: Any) -> bool:
    return hasattr(leaf, "unbox")


def _file(folder: Path, name: str) -> Path:
    path = folder.expanduser() / name
    if not path.is_file():
        raise ValueError(f"source={folder} has no {name}: give the folder of a clone")
    return path
