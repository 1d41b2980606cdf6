"""Every numeric option of every command with senseless numbers: one line, or legal and listed."""

import dataclasses
import functools
import json
import math
import re
import types
import typing
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import SMALL

from memgen import LoRAConfig
from train import evaluate
from train.cli.calls import from_text
from train.cli.command import parse, run_command
from train.cli.config_json import as_json
from train.cli.numbers import check_numbers
from train.data.chat_data import ChatDataConfig
from train.devices import memory
from train.devices.distributed import _report
from train.devices.failures import RunFailed
from train.engine.optim import OptimizerConfig, make_optimizer
from train.evaluate import EvaluateConfig
from train.finetuning.job import SFTConfig, SFTJob
from train.generate import GenerateConfig
from train.pretrain import dry_run
from train.pretraining.config import RunConfig
from train.pretraining.job import make_run
from train.rl.config import RLConfig
from train.rl.named_tasks import make_task
from train.rl.parts import part_from_text
from train.tokenizer import TokenizerConfig

CONFIGS = {
    "pretrain": RunConfig(model=dataclasses.replace(SMALL, vocab_size=257)),
    "sft": SFTConfig(),
    "rl": RLConfig(),
    "generate": GenerateConfig(checkpoint="run"),
    "evaluate": EvaluateConfig(checkpoint="run"),
    "tokenizer": TokenizerConfig(),
}
WRONG = [math.nan, math.inf, -math.inf, -1, 0, 1e308, 2**70]


def numeric(config: Any, above: tuple[str, ...] = ()) -> dict[tuple[str, ...], type]:
    """The fields that hold a whole or a real number, those of configs inside included."""
    found: dict[tuple[str, ...], type] = {}
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        kinds = {hints[field.name], *typing.get_args(hints[field.name])}
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= numeric(value, (*above, field.name))
        elif kind := next((kind for kind in (float, int) if kind in kinds), None):
            found[(*above, field.name)] = kind
    return found


def replaced(config: Any, path: tuple[str, ...], value: Any) -> Any:
    name, *rest = path
    inner = replaced(getattr(config, name), tuple(rest), value) if rest else value
    return dataclasses.replace(config, **{name: inner})


def value_at(config: Any, path: tuple[str, ...]) -> Any:
    return functools.reduce(getattr, path, config)


def accepted(config: Any) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for path, kind in numeric(config).items():
        for value in WRONG:
            if kind is int and not isinstance(value, int):
                continue  # no whole number: refused as such by the parser
            given = value if kind is int else float(value)
            if isinstance(value_at(config, path), tuple):
                given = (given,)
            try:
                check_numbers(replaced(config, path, given))
            except ValueError as error:
                assert "\n" not in str(error) and len(str(error)) < 400
            else:
                found.setdefault(".".join(path), []).append(value)
    return found


# What is legal, by the end of an option's name.
ZERO = tuple(
    [
        "nope_layers",
        "fork_layers",
        "burst",
        "noise",
        "optimizer.b1",
        "optimizer.b2",
        "optimizer.weight_decay",
        "optimizer.warmup",
        "optimizer.decay",
        "optimizer.final_ratio",
        "evaluation.every",
        "evaluation.rows",
        "evaluation.positions",
        "rows",
        "positions",
        "seed",
        "lora.dropout",
        "prompt_latents",
        "inference_latents",
        "max_inference_events",
        "insertion_prob",
        "examples",
        "method.clip_low",
        "method.clip_high",
        "method.kl",
        "min_p",
        "kl",
        "validation",
        "threshold_offset",
        "sweep_offset",
        "mesh.data",
        "mesh.fsdp",
        "mesh.tensor",
    ]
)
MINUS_ONE = ["mesh.data", "mesh.fsdp", "mesh.tensor", "threshold_offset", "sweep_offset"]
INFINITE = [
    "clip_high",
    "dual_clip",
    "importance_cap",
    "advantage_clip",
    "optimizer.clip",
]  # no clipping


@pytest.mark.parametrize("command", CONFIGS)
def test_senseless_numbers_are_refused(command: str):
    for name, values in accepted(CONFIGS[command]).items():
        for value in values:
            if value == 0 and name == "temperature":
                legal = command == "generate"
            elif value == 0:
                legal = name.endswith(ZERO)
            elif value == -1:
                legal = name.endswith(tuple(MINUS_ONE))
            elif value in (math.inf, 1e308):
                legal = name.endswith(tuple(INFINITE))
            else:
                legal = value == 2**70  # 1.2e21, finite in 32 bits
            assert legal, (name, value)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--keep", "0"], "keep=0 is below 1"),
        (["--keep-every", "0"], "keep_every=0 is below 1"),
        (["--seed", str(2**63)], "seed=9223372036854775808 is out of range"),
        (["--batch-size", str(10**13)], "batch_size=10000000000000 is out of range"),
        (["--model.embed-dim", str(10**19)], "embed_dim=10000000000000000000 is above 2147483647"),
        (["--model.rope-base", "nan"], "rope_base=nan: choose a positive number"),
        (["--optimizer.learning-rate", "inf"], "learning_rate=inf is not positive and finite"),
        (["--optimizer.b1", "nan"], "b1=nan: choose from 0 to below 1"),
        (["--optimizer.weight-decay", "nan"], "weight_decay=nan"),
        (["--optimizer.eps", "-1"], "eps=-1.0 is not positive and finite"),
        (["--model.policy", "PrefixRank(ratio=1e308)"], "ratio=1e+308 is above 1000"),
        (["--model.policy", "PrefixRank(window=5000000000)"], "window=5000000000 is above"),
        (["--model.policy", "x" * 100_000], "has 100000 characters, more than 10000"),
        (["--model.policy", "PrefixRank(" + "(" * 9000], "write PrefixRank("),
    ],
)
def test_what_the_command_says(words: list[str], line: str):
    with pytest.raises(ValueError) as caught:
        parse(RunConfig, words, CONFIGS["pretrain"])
    text = str(caught.value)
    assert line in text and "\n" not in text and len(text) < 500


@pytest.mark.parametrize(
    ("task", "line"),
    [
        ("copy(length=1000000000)", "copy: length=1000000000: choose 10000 or less"),
        ("arithmetic(digits=1000000000)", "digits=1000000000: choose 9 or less"),
        ("reverse()()", "write reverse("),
        ("copy(length=" + "9" * 5000 + ")", "write copy("),
    ],
)
def test_tasks_that_fill_the_memory_are_refused(task: str, line: str):
    with pytest.raises(ValueError, match="^[^\n]*$") as caught:
        make_task(task, 0)
    assert line in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("method", "grpo(kl=1e999)"),
        ("method", "brorl(kl=1e999)"),
        ("loss", "clipped(kl=1e999)"),
        ("allocator", "knapsack(epsilon=1e999)"),
        ("reward", "overlong(buffer=1, factor=1e999)"),
    ],
)
def test_infinite_literals_are_refused(kind: str, text: str):
    with pytest.raises(ValueError, match="^[^\n]*$"):
        part_from_text(kind, text)


def test_infinite_literals_anywhere_in_a_value_are_refused():
    @dataclasses.dataclass
    class Weights:
        by_name: dict[str, float]
        bound: float = 1.0
        may_be_infinite: typing.ClassVar = frozenset({"bound"})

    for inside in ("1e999", "-1e999", "(1, 1e999)", "[1e999]", "{1e999: 1}"):
        with pytest.raises(ValueError, match="^part Weights: by_name=.*: choose a finite number$"):
            from_text(f"Weights(by_name={{'a': {inside}}})", {"Weights": Weights}, "part")
    found = from_text("Weights(by_name={}, bound=1e999)", {"Weights": Weights}, "part")
    assert found.bound == math.inf


def test_an_infinite_clip_turns_clipping_off():
    """Bit for bit as a very large one, also of a run that is read back from its metadata."""
    params = nnx.state(nnx.eval_shape(lambda: nnx.Linear(3, 2, rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), params)
    gradients = jax.tree.map(lambda leaf: 100 * leaf, params)

    def updated(clip: float) -> list[Any]:
        config = parse(RunConfig, ["--optimizer.clip", str(clip)], CONFIGS["pretrain"])
        assert json.loads(json.dumps(as_json(config), allow_nan=False)) == as_json(config)
        transform = make_optimizer(config.optimizer, lambda _: 0.1, params)
        state = jax.eval_shape(transform.init, params)
        assert jax.tree.structure(state) == jax.tree.structure(
            jax.eval_shape(make_optimizer(OptimizerConfig(), lambda _: 0.1, params).init, params)
        )
        update = lambda given: transform.update(given, transform.init(given), given)  # noqa: E731
        return jax.tree.leaves(jax.jit(update)(gradients)[1])

    for off, large, on in zip(updated(math.inf), updated(1e30), updated(1.0), strict=True):
        np.testing.assert_array_equal(off, large)
        assert off.ndim == 0 or (np.asarray(off) != np.asarray(on)).any()
    for clip in ("-inf", "nan", "0"):
        with pytest.raises(ValueError, match="clip=.* is not positive: choose a norm, or inf"):
            parse(RunConfig, ["--optimizer.clip", clip], CONFIGS["pretrain"])


def test_repeated_targets_of_an_adapter_are_refused():
    with pytest.raises(ValueError, match="names a layer twice"):
        LoRAConfig(targets=("q", "q"))


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        (("batch_size",), 2**31 - 8, r"tokens of a step need [0-9,]+\.\d GiB, this machine has"),
        (("model", "embed_dim"), 2**22, r"optimizer state need [0-9,]+\.\d GiB on each device"),
        (("model", "mlp_dim"), 2**31 - 1, r"optimizer state need [0-9,]+\.\d GiB on each device"),
    ],
)
def test_a_plan_that_exceeds_the_memory_is_refused_with_its_estimate(
    path: tuple[str, ...], value: int, line: str
):
    with pytest.raises(ValueError, match=line):
        make_run(replaced(CONFIGS["pretrain"], path, value))


ROWS = 2**31 - 8


@pytest.fixture
def gibibyte(monkeypatch: pytest.MonkeyPatch):
    """This machine, as a container that may have one sees it."""
    monkeypatch.setattr(memory, "_container_limit", lambda: 2**30)


def test_every_command_estimates_its_rows_before_it_allocates(
    gibibyte, monkeypatch: pytest.MonkeyPatch
):
    """Weights, tasks and rows that do not exist are not even looked for."""
    line = r"^the 2147483640 rows of \d+ tokens of a step need [0-9,.]+ GiB, this machine has 1.0 "
    with pytest.raises(ValueError, match=line):
        SFTJob(SFTConfig(weights="nowhere", batch_size=ROWS))
    with pytest.raises(ValueError, match="16 rows of 2147483647 tokens"):
        data = ChatDataConfig(("nowhere",), seq_len=2**31 - 1)
        SFTJob(SFTConfig(weights="nowhere", data=data))
    with pytest.raises(ValueError, match=line):
        evaluate.main(EvaluateConfig(model="nowhere", tasks=("nowhere",), batch_size=ROWS))
    loaded = types.SimpleNamespace(model=types.SimpleNamespace(fork_policy=None), context_length=8)
    monkeypatch.setattr(evaluate, "load_model", lambda _: loaded)
    with pytest.raises(ValueError, match=line):
        evaluate.main(EvaluateConfig(checkpoint="nowhere", batch_size=ROWS))


def test_the_memory_of_a_gpu_that_reports_none_is_not_the_hosts(monkeypatch: pytest.MonkeyPatch):
    class Device:
        def __init__(self, platform: str, stats: Any):
            self.platform, self.memory_stats = platform, lambda: stats

    devices = [Device("cpu", None), Device("gpu", None), Device("tpu", {}), Device("gpu", {})]
    devices += [Device("gpu", {"bytes_limit": 5}), Device("cpu", {"bytes_limit": 7})]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    found = [memory.device_bytes(device) for device in devices]
    assert found == [memory.host_bytes(), None, None, None, 5, 7]
    assert memory.device_bytes(Device("cpu", None)) is None  # of another process


def test_a_dry_run_of_another_machine_says_its_memory(gibibyte, capsys, tmp_path: Path):
    config = CONFIGS["pretrain"]
    config = dataclasses.replace(config, batch_size=ROWS, dry_run=True, out=str(tmp_path))
    dry_run(replaced(config, ("model", "embed_dim"), 2**22))
    said = capsys.readouterr().out
    [line] = [line for line in said.splitlines() if line.startswith("memory")]
    found = re.search(
        r"at least ([0-9,.]+) GiB on each device \(here 1.0 GiB\), ([0-9,.]+) GiB of", line
    )
    assert found is not None and float(found[1].replace(",", "")) > 1000
    rows = ROWS * config.data.seq_len * 12 / 2**30
    assert float(found[2].replace(",", "")) == pytest.approx(rows, rel=1e-3)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError("Unable to allocate 264. GiB"), "out of memory (Unable to allocate 264. GiB)"),
        (MemoryError(), "out of memory (no more was to be had)"),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 bytes\nmore"), "(RESOURCE_EXHAUSTED: 9 bytes): make"),
        (RunFailed("the loss is nan"), "error: the loss is nan"),
        (RuntimeError("another"), None),
    ],
)
def test_what_is_no_mistake_of_a_command_is_one_line(error, says, monkeypatch, capsys):
    def main(_: Any) -> None:
        raise error

    monkeypatch.setattr("sys.argv", ["command"])
    with pytest.raises(RuntimeError if says is None else SystemExit) as end:
        run_command(main, TokenizerConfig)
    if says is not None:
        line = capsys.readouterr().err
        assert line.startswith("error: ") and says in line and line.count("\n") == 1
        assert isinstance(end.value, SystemExit) and end.value.code == 1


def test_a_run_that_fails_in_one_of_several_processes_is_one_line(capsys):
    assert _report(RunFailed("the loss is nan")) == 1
    assert capsys.readouterr().err == "error: the loss is nan\n"
