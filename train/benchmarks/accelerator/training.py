"""Measure training: time, MFU and memory up to the largest batch; bfloat16 against float32."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from thoughtbubbles import ModelConfig
from train.aot.program import Program, program_of
from train.aot.report import memory_of
from train.benchmarks.accelerator.record import Record, read, seconds_per_call
from train.benchmarks.accelerator.sizes import Sizes
from train.benchmarks.models import random_tokens
from train.data import DataConfig
from train.devices.attention import resolve
from train.devices.hardware import chip_of
from train.devices.mesh import MeshConfig, make_mesh, place
from train.engine.optim import OptimizerConfig
from train.engine.state import make_trainable
from train.engine.step import make_train_step
from train.pretraining.config import RunConfig

ROOM = 0.85  # fraction of device memory up to which forecasts for larger batches are trusted


def run_config(model: ModelConfig, batch: int, seq_len: int) -> RunConfig:
    """Return the config of pretraining a model on `batch` rows of `seq_len` tokens per step."""
    return RunConfig(
        model=model, data=DataConfig(seq_len=seq_len), batch_size=batch, mesh=MeshConfig(1, 1, 1)
    )


def step_program(config: RunConfig, devices: Any) -> Program:
    """Make the train step of a run on the given devices, as a program to compile."""
    mesh = make_mesh(config.mesh, devices)
    return program_of(config, mesh, "step", resolve(config.model, mesh, config.attention))


def memory_limit() -> float | None:
    """Return the bytes of device memory that jax may use; None where no limit is known (CPUs)."""
    device = jax.devices()[0]
    chip, stats = chip_of(device.device_kind), device.memory_stats() or {}
    return stats.get("bytes_limit") or (chip.memory if chip else None)


def measure_steps(record: Record, sizes: Sizes) -> None:
    """Measure each model's train step with growing batches, until a batch does not fit."""
    for name, model in sizes.models.items():
        batch = sizes.first_batch
        while batch <= sizes.largest_batch:
            run = run_config(model, batch, sizes.seq_len)
            found = record.measure(
                f"{name} batch {batch}", functools.partial(time_step, run, sizes.calls)
            )
            if "step_seconds" not in found:
                break
            batch = next_batch(batch, found, memory_limit())


def next_batch(batch: int, found: dict[str, Any], limit: float | None) -> int:
    """Choose the next batch size to try: the current batch size, doubled one or more times.

    A batch size is skipped if twice this size is forecast to need at most 85 % of the memory. The
    forecast assumes that temporaries and results grow in proportion to the batch size.

    Args:
        batch: Number of rows that fitted.
        found: Measurement with this batch size, with the `forecast` of memory.
        limit: Device memory in bytes; None, if unknown, doubles the batch size once.
    """
    grown = 2 * batch
    if limit is None:
        return grown
    forecast = found["forecast"]
    variable = forecast["temporaries"] + forecast["results"]
    if variable <= 0:  # a runtime that counts no memory
        return grown
    fixed = forecast["peak"] - variable
    while fixed + variable * 2 * grown / batch <= ROOM * limit:
        grown *= 2
    return grown


def time_step(config: RunConfig, calls: int) -> dict[str, Any]:
    """Measure a train step, unless the compiled program's forecast exceeds the device's memory.

    Returns:
        Dict of the `forecast` of memory (see `memory_of`) and `fits`. If the program fits, the dict
        also has `parameters`, `batch`, `step_seconds`, `tokens_per_second`, `tflops_per_second`,
        and `mfu`, which is None for an unknown chip.
    """
    device = jax.devices()[0]
    compiled, forecast, too_large = compiled_step(config)
    if too_large:
        return {"forecast": forecast, "fits": False}
    with running(config, compiled) as step:
        seconds = seconds_per_call(step, calls)
    chip = chip_of(device.device_kind)
    flops = config.step_flops
    return {
        "parameters": config.model.num_params(),
        "batch": config.batch_size,
        "fits": True,
        "step_seconds": seconds,
        "tokens_per_second": config.batch_size * config.data.seq_len / seconds,
        "tflops_per_second": flops / seconds / 1e12,
        "mfu": flops / seconds / chip.flops if chip else None,
        "forecast": forecast,
    }


def compiled_step(config: RunConfig) -> tuple[Any, dict[str, Any], bool]:
    """Compile a train step for the first device.

    Returns:
        The compiled step, the forecast of its memory (see `memory_of`), and whether the forecast
        peak exceeds the device's memory.
    """
    devices = jax.devices()[:1]
    program = step_program(config, devices)
    compiled = program.function.lower(*program.inputs).compile()
    forecast, limit = memory_of(compiled, program, devices[0].platform), memory_limit()
    return compiled, forecast, limit is not None and forecast["peak"] > limit


@contextlib.contextmanager
def running(config: RunConfig, compiled: Any) -> Iterator[Any]:
    """Return a context manager that gives a function, which runs a train step at each call.

    The function trains on random tokens and returns the loss of the step. The parameters are freed
    at the end of the context.

    Args:
        config: Config of the run.
        compiled: Compiled train step, as `compiled_step` returns it.
    """
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    trainable = make_trainable(
        config.model, config.optimizer, config.steps, mesh, config.seed, config.attention
    )
    shape = config.batch_size, config.data.seq_len + 1
    rows = place(random_tokens(config.model.vocab_size, *shape), mesh)
    holder = [trainable.init()]

    def step() -> jax.Array:
        holder[0], metrics = compiled(holder[0], rows)
        return metrics["loss"]

    yield step
    holder.clear()  # the next batch needs the memory


def measure_memory(record: Record, sizes: Sizes) -> None:
    """Measure each model's peak memory and its forecast, at the largest batch that was timed."""
    steps = read(record.folder, "step", record.data["tiny"]) or {"measurements": {}}
    largest: dict[str, tuple[int, int]] = {}
    for name in sizes.models:
        largest[name] = max(
            (
                (found["forecast"]["peak"], found["batch"])
                for key, found in steps["measurements"].items()
                if key.startswith(f"{name} ") and "step_seconds" in found
            ),
            default=(0, sizes.first_batch),
        )
    # The device counts the peak of the process, so models run in increasing order of memory.
    for name in sorted(largest, key=lambda name: largest[name]):
        run = run_config(sizes.models[name], largest[name][1], sizes.seq_len)
        record.measure(name, functools.partial(peak_of, run))


def peak_of(config: RunConfig) -> dict[str, Any]:
    """Measure the peak memory of two train steps, and compare it with the forecast.

    Returns:
        Dict of `batch`, `forecast_bytes`, `measured_bytes` and `measured_over_forecast`. The last
        two entries are None if the device counts no peak, or if the peak did not rise, because the
        device counts the peak of the whole process, in which an earlier program may have needed
        more.
    """
    device = jax.devices()[0]
    before = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    compiled, forecast, _ = compiled_step(config)
    with running(config, compiled) as step:
        jax.block_until_ready([step(), step()])
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    measured = peak if peak is not None and peak > before else None
    return {
        "batch": config.batch_size,
        "forecast_bytes": forecast["peak"],
        "measured_bytes": measured,
        "measured_over_forecast": measured / forecast["peak"] if measured else None,
    }


def measure_precision(record: Record, sizes: Sizes) -> None:
    """Compare each model's loss curves in float32 and bfloat16, on the same batches.

    Both dtypes use XLA's attention.
    """
    for name, model in sizes.precision_models.items():
        curves = [
            record.measure(
                f"{name} {dtype}",
                functools.partial(loss_curve, dataclasses.replace(model, dtype=dtype), sizes),
            )
            for dtype in ("float32", "bfloat16")
        ]
        if all("loss" in curve for curve in curves):
            # A loss that diverged is None when it is read from the file.
            exact, rounded = (np.array(curve["loss"], np.float64) for curve in curves)
            record.put(
                f"{name} difference",
                {
                    "max_absolute": float(np.abs(exact - rounded).max()),
                    "last_ten_float32": float(exact[-10:].mean()),
                    "last_ten_bfloat16": float(rounded[-10:].mean()),
                },
            )


def loss_curve(model: ModelConfig, sizes: Sizes) -> dict[str, Any]:
    """Train a model on texts that `chains` samples, and return the `loss` of each step.

    Matrix products of a float32 model are computed in full precision.
    """
    mesh, steps = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), sizes.precision_steps
    with jax.default_matmul_precision("highest" if model.dtype == "float32" else "default"):
        trainable = make_trainable(model, OptimizerConfig(), steps, mesh, attention="xla")
        step, state, losses = make_train_step(trainable), trainable.init(), []
        for number in range(steps):
            rows = chains(model.vocab_size, sizes.precision_batch, sizes.seq_len + 1, number)
            state, metrics = step(state, place(rows, mesh))
            losses.append(metrics["loss"])
    return {"loss": [float(loss) for loss in losses]}


def chains(vocab_size: int, rows: int, length: int, seed: int) -> np.ndarray:
    """Sample texts `[rows, length]` int32 in which the previous token determines 90 % of tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab_size, (rows, length), dtype=np.int32)
    known = rng.random((rows, length)) < 0.9
    for position in range(1, length):
        follows = (tokens[:, position - 1] * 31 + 7) % vocab_size
        tokens[:, position] = np.where(known[:, position], follows, tokens[:, position])
    return tokens
