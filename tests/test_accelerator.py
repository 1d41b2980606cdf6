"""The benchmark of an accelerator, in tiny sizes on a CPU: all parts, cuts, mistakes."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import ROOT

from thoughtbubbles import ModelConfig
from thoughtbubbles.attention import attend_reference
from train.benchmarks.accelerator import config as command
from train.benchmarks.accelerator import inference, kernels, part, queued, record, training
from train.benchmarks.accelerator.config import AcceleratorBenchmark, main
from train.benchmarks.accelerator.record import (
    DeviceLost,
    Record,
    TimeIsUp,
    read,
    seconds_in_a_loop,
)
from train.benchmarks.accelerator.sizes import tiny_sizes

MODEL = {"embed_dim": 8, "num_layers": 1, "num_heads": 2}
RUN = {"name": "small", "model": MODEL, "corpus": "corpus.npy", "vocab_size": 64, "steps": 3,
       "batch_size": 2, "seq_len": 8, "held_out": 3}  # fmt: skip


def queue(folder: Path, *runs: dict, tokens: np.ndarray | None = None) -> str:
    """A file of runs, and their corpus."""
    tokens = np.arange(200, dtype=np.uint16) % 64 if tokens is None else tokens
    np.save(folder / "corpus.npy", tokens)
    path = folder / "runs.jsonl"
    path.write_text("\n".join(map(json.dumps, runs)))
    return str(path)


def test_every_part_is_measured_and_not_twice(tmp_path: Path, capsys, monkeypatch):
    sizes = tiny_sizes()
    one = dataclasses.replace(sizes, models={"bubbles": sizes.models["bubbles"]})
    monkeypatch.setattr(part, "tiny_sizes", lambda: one)
    parts = part.PARTS[:-1]  # "then" is cut and goes on below
    options = AcceleratorBenchmark(tiny=True, out=str(tmp_path), parts=parts)
    main(options)
    found = {name: read(tmp_path, name) for name in parts}
    assert all(data and data["finished"] for data in found.values())
    results = {name: data["measurements"] for name, data in found.items() if data}
    errors = [key for part in results.values() for key in part if "error" in part[key]]
    assert errors == []
    assert all(0 < r["errors"]["out"]["relative"] < 0.01 for r in results["kernels"].values())
    step, memory = results["step"]["bubbles batch 2"], results["memory"]["bubbles"]
    assert step["step_seconds"] > 0 and step["mfu"] is None  # of no known chip
    assert memory["forecast_bytes"] == step["forecast"]["peak"] > 0
    assert memory["measured_bytes"] is None  # CPUs don't count it
    assert results["decode"]["bubbles batch 1"]["tokens_per_second"] > 0
    assert results["rl"]["reverse"]["rollouts"] == 2
    assert 0 < results["precision"]["plain difference"]["max_absolute"] < 0.01

    capsys.readouterr()
    monkeypatch.setattr(Record, "put", lambda *_: pytest.fail("measured again"))
    main(options)
    main(dataclasses.replace(options, table=True))
    shown = capsys.readouterr().out
    assert "### rl (cpu, jax" in shown and "| bubbles batch 2 | " in shown


def test_a_loss_that_diverged_is_no_number_and_a_damaged_file_is_named(tmp_path: Path):
    Record(tmp_path, "step", 9).measure("one", lambda: {"loss": [1.0, float("nan")]})
    text = (tmp_path / "step.json").read_text()
    assert "NaN" not in text and "null" in text
    found = read(tmp_path, "step")
    assert found and found["measurements"]["one"]["loss"] == [1.0, None]
    for dtype in ("float32", "bfloat16"):
        Record(tmp_path, "precision", 9).put(f"plain {dtype}", {"loss": [1.0, float("nan")]})
    record = Record(tmp_path, "precision", 9)
    training.measure_precision(record, tiny_sizes())
    assert np.isnan(record.measurements["plain difference"]["max_absolute"])
    whole = json.loads((tmp_path / "step.json").read_text())
    edited = json.dumps(whole | {"measurements": {"one": 3}})
    for content in ("", "[" * 100_000, "[]", "{}", edited):
        (tmp_path / "step.json").write_text(content)
        with pytest.raises(ValueError, match=r"step.json is damaged .*: remove it"):
            Record(tmp_path, "step", 9)


def test_a_process_without_the_heavy_packages_measures_a_part(tmp_path: Path):
    """In a process of its own, by argparse, with jax, flax, optax, orbax and tokenizers alone."""
    heavy = ("tyro", "grain", "array_record", "tensorflow_datasets", "tensorboardX", "matplotlib",
             "pyarrow", "gguf", "jinja2", "safetensors", "sklearn", "bm25s", "lm_eval")  # fmt: skip
    block = f"""\
        import sys

        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {heavy!r}:
                    raise ModuleNotFoundError(f"{{name}} is blocked")

        sys.meta_path.insert(0, Blocked())
        """
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(block))
    script = (
        "import sys, train.benchmarks.accelerator.inference, train.benchmarks.accelerator.training,"
        " train.benchmarks.accelerator.queued\n"
        "from train.benchmarks.accelerator.__main__ import command\n"
        f"sys.argv = ['x', '--tiny', '--parts', 'then', '--out', {str(tmp_path / 'out')!r}]\n"
        "command()\n"
        "import tyro"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    ran = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert ran.stderr.splitlines()[-1] == "ModuleNotFoundError: tyro is blocked", ran.stderr


def test_a_part_that_is_cut_goes_on(tmp_path: Path):
    """What is measured stays; the time of a part is no reason to measure less of the next call."""
    with pytest.raises(TimeIsUp):
        Record(tmp_path, "step", 0).measure("one", lambda: {"seconds": 1})
    record = Record(tmp_path, "step", 60)
    assert record.measure("one", lambda: {"seconds": 1})["seconds"] == 1
    again = Record(tmp_path, "step", 0)
    assert again.measure("one", lambda: pytest.fail("measured again"))["seconds"] == 1
    with pytest.raises(TimeIsUp):
        again.measure("two", dict)


def test_running_out_of_memory_is_one_line_and_leaves_the_rest(tmp_path: Path, capsys, monkeypatch):
    def too_large(config, calls):
        if config.batch_size > 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore")
        return {"step_seconds": 1.0}

    monkeypatch.setattr(training, "time_step", too_large)
    record = Record(tmp_path, "step", 60)
    training.measure_steps(record, dataclasses.replace(tiny_sizes(), largest_batch=64))
    assert list(record.measurements) == [
        f"{name} batch {batch}" for name in ("plain", "bubbles") for batch in (2, 4)
    ]
    told = (
        "step: bubbles batch 4: RuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."
    )
    assert capsys.readouterr().err.splitlines()[-1] == told
    saved = read(tmp_path, "step")
    assert saved and saved["measurements"]["plain batch 4"]["out_of_memory"]
    assert "error" not in saved["measurements"]["plain batch 2"]


def test_a_measurement_that_ends_its_process_is_passed_over(tmp_path: Path, capsys):
    """It is begun twice; what never returned has no result."""
    for _ in range(2):
        with pytest.raises(BaseException, match="the process ends"):
            Record(tmp_path, "kernels", 60).measure("crash", lambda: _end())
    record = Record(tmp_path, "kernels", 60)
    assert "ended twice" in record.measure("crash", dict)["error"]
    assert record.measure("next", lambda: {"seconds": 1})["seconds"] == 1
    assert "crash: the process ended twice" in capsys.readouterr().err


class _Ends(BaseException):
    pass


def _end() -> dict:
    raise _Ends("the process ends")


def test_a_timed_loop_makes_every_call():
    """A compiler leaves out a call whose result is unused, and makes an unchanging call once."""
    made = []

    def call(x, y):
        def host(x):
            made.append(x)
            return x

        return jax.pure_callback(host, jax.ShapeDtypeStruct((), x.dtype), x), x * y

    zero = np.float32(0)
    assert seconds_in_a_loop(call, (zero, zero), 3) > 0
    assert len(made) == 3 + 3 * 3  # a loop warms up


def test_reinforcement_learning_is_measured_on_one_device(monkeypatch):
    meshes = []

    def one_step(job, repeats):
        meshes.append(job.trainable.mesh.size)
        return {"rollout_seconds": 1.0, "update_seconds": 1.0, "tokens": repeats}

    monkeypatch.setattr(inference, "best_step", one_step)
    sizes = tiny_sizes()
    inference.rl_speed(sizes.rl_model, dataclasses.replace(sizes, rl_prompts=jax.device_count()))
    assert meshes == [1] and jax.device_count() > 1


def test_full_sizes_need_an_accelerator(tmp_path: Path):
    with pytest.raises(ValueError, match="jax finds no accelerator here"):
        part.run_part("kernels", tmp_path, 60, False, None)


def test_a_failed_run_may_be_mended_and_a_cut_one_may_not_change(tmp_path: Path, monkeypatch):
    def fails(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: too much")

    train, name = queued._train, "small seed 0"
    monkeypatch.setattr(queued, "batch_of", fails)  # once the run has its folder
    record = Record(tmp_path, "then", 60)
    queued.measure_queue(record, queue(tmp_path, RUN))
    assert record.measurements[name]["out_of_memory"]
    monkeypatch.setattr(queued, "_train", lambda *_: {"fine": True})
    smaller = queue(tmp_path, RUN | {"batch_size": 1})
    queued.measure_queue(record, smaller)
    assert record.measurements[name]["fine"]
    with pytest.raises(ValueError, match="small seed 0 of .* had other settings"):
        queued.measure_queue(record, queue(tmp_path, RUN))
    assert train is not queued._train


def test_examples_of_queues_are_read(tmp_path: Path):
    page = (ROOT / "docs" / "accelerators.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith('{"name"')]
    lines.append(re.findall(r"`(\{.*?\})`", (queued.__doc__ or "").replace("\n", " "))[0])
    assert len(lines) > 1
    for line in lines:
        run = queued._run_of(json.loads(line), tmp_path)
        assert run.vocab_size == 8192 and run.model.embed_dim == 512


def test_batches_that_surely_fit_are_passed_over():
    found = {"forecast": {"temporaries": 90, "results": 10, "peak": 200}}
    assert training.next_batch(16, found, None) == 32
    assert training.next_batch(16, found, 300) == 32  # would need 300 of which 255 are believed
    assert training.next_batch(16, {"forecast": dict.fromkeys(found["forecast"], 0)}, 300) == 32
    # 8 times the rows need 900, 16 times 1700.
    assert training.next_batch(16, found, 901 / training.ROOM) == 128
    assert training.next_batch(16, found, 899 / training.ROOM) == 64


def test_a_wrong_kernel_has_a_large_error():
    shape = tiny_sizes().kernels[0]

    def wrong(query, key, value, bias):
        return attend_reference(query, key, value, None)

    errors = kernels.against_reference(wrong, shape, True, 1)["errors"]
    assert errors["out"]["relative"] > 0.1 and errors["d_bias"]["relative"] == 1


def test_a_training_run_that_is_cut_ends_as_if_it_was_not(tmp_path: Path, monkeypatch):
    path, losses = queue(tmp_path, RUN), {}
    for name in ("whole", "cut"):
        folder = tmp_path / name
        folder.mkdir()
        if name == "cut":
            left = [60, 60, -1]  # before the run, after its first and second step
            monkeypatch.setattr(Record, "seconds_left", property(lambda _, left=left: left.pop(0)))
            with pytest.raises(TimeIsUp):
                queued.measure_queue(Record(folder, "then", 60), path)
            monkeypatch.undo()
        record = Record(folder, "then", 60)
        queued.measure_queue(record, path)
        losses[name] = record.measurements["small seed 0"]
    assert losses["cut"]["losses"] == losses["whole"]["losses"]
    assert losses["cut"]["held_out_nats"] == losses["whole"]["held_out_nats"]
    assert [number for number, _ in losses["whole"]["losses"]] == [1, 2, 3]
    assert 3 < losses["whole"]["held_out_nats"] < 5  # ln 64 = 4.2


def test_held_out_rows_are_never_trained_on():
    run = queued.QueuedRun("a", ModelConfig(64, **MODEL), "", 64, 1, batch_size=512, seq_len=8,
                           held_out=3)  # fmt: skip
    corpus = np.arange(60, dtype=np.uint16)
    rows = queued.batch_of(corpus, run, 0, 0)
    assert rows.max() == 59 - 3 * 8 - 1 and rows.min() == 0  # position 35 is the first input scored
    assert (np.diff(rows) == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 32}, "line 1: corpus {}/corpus.npy holds token id 63, vocab_size=32"),
        ({"model": MODEL | {"vocab_size": 32}}, "vocab_size=64 and the model vocab_size=32"),
        ({"steps": 0}, "steps=0: choose a whole number of 1 or more"),
        ({"stepz": 2}, "unknown field 'stepz'"),
        ({"model": MODEL | {"depth": 2}}, "depth"),
        ({"seq_len": 100}, "has 200 tokens"),
        ({"corpus": "other.npy"}, "other.npy is no .npy file that opens"),
        ({"name": "a/b"}, "name='a/b'"),
        ({"optimizer": {"rate": 1}}, "unknown option 'rate' of optimizer: choose from name, learn"),
        ({"optimizer": {"learning_rate": "x"}}, "optimizer: learning_rate='x' is not float"),
        ({"model": "150m"}, "model='150m': write an object"),
        ({"seeds": 3}, "seeds=3: write a list"),
        ({"seeds": [1, 1]}, "seeds=[1, 1]: choose one or more different"),
        ({"corpus": 3}, "corpus=3: write a text"),
        ({"optimizer": None}, "optimizer=None: write an object"),
    ],
)
def test_a_mistake_in_the_file_of_runs_names_its_line(tmp_path: Path, change, message):
    path = queue(tmp_path, RUN | change)
    with pytest.raises(ValueError) as error:
        queued.read_queue(path)
    assert f"{path}, line 1: " in str(error.value)
    assert message.format(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_of_runs_that_is_none_is_one_line(tmp_path: Path):
    path = tmp_path / "queue.jsonl"
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="line 1: maximum recursion depth"):
        queued.read_queue(str(path))
    with pytest.raises(ValueError, match="is no regular file"):
        queued.read_queue(str(tmp_path))


def test_corpora_of_another_kind_are_refused(tmp_path: Path):
    path = queue(tmp_path, RUN, tokens=np.zeros(200))
    with pytest.raises(ValueError, match=r"is float64\[200\]: write one row of uint16 or uint32"):
        queued.read_queue(path)
    np.savez(tmp_path / "several.npz", tokens=np.zeros(200, np.uint16))
    with pytest.raises(ValueError, match="several.npz holds several arrays"):
        queued.read_queue(queue(tmp_path, RUN | {"corpus": "several.npz"}))


def test_mistakes_are_one_line(tmp_path: Path):
    with pytest.raises(ValueError, match=r"minutes=0.5 is below 1"):
        AcceleratorBenchmark(minutes=0.5)
    with pytest.raises(ValueError, match="unknown part 'kernel': choose from kernels, step"):
        AcceleratorBenchmark(parts=("kernel",))
    Record(tmp_path, "step", 60, "TPU v9").finish()
    with pytest.raises(ValueError, match="is of TPU v9, this machine has cpu: choose another"):
        Record(tmp_path, "step", 60)
    Record(tmp_path, "kernels", 60, tiny=True).finish()
    for tiny, name in ((False, "kernels"), (True, "step")):
        with pytest.raises(ValueError, match=f"{name}.json is of .* sizes: choose another"):
            main(AcceleratorBenchmark(out=str(tmp_path), tiny=tiny, parts=(name,)))
    with pytest.raises(ValueError, match="holds no results"):
        main(AcceleratorBenchmark(out=str(tmp_path / "none"), table=True))


def test_a_lost_device_ends_its_process_after_the_measurement_is_written(
    tmp_path: Path, monkeypatch
):
    of_part = Record(tmp_path, "step", 60)

    def fails() -> dict[str, float]:
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

    assert "ILLEGAL" in of_part.measure("first", fails)["error"], "the device computes: go on"
    monkeypatch.setattr(record, "device_works", lambda: False)
    with pytest.raises(DeviceLost):
        of_part.measure("second", fails)
    saved = read(tmp_path, "step")
    assert saved and "ILLEGAL" in saved["measurements"]["second"]["error"]
    assert "error" not in of_part.measure("third", dict), "nothing failed: nothing is asked"


def test_a_part_that_dies_leaves_the_others(tmp_path: Path, capsys, monkeypatch):
    statuses = iter([-9, part.LOST, 0])
    ran = []
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")

    def run(command, env, **_):
        given = json.loads(command[-1])
        assert given["retry"] == (given["name"] not in ran), "once a command"
        ran.append(given["name"])
        assert env["XLA_CLIENT_MEM_FRACTION"] == "0.5"
        assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in env  # jax refuses both
        return subprocess.CompletedProcess(command, next(statuses))

    monkeypatch.setattr(command.subprocess, "run", run)
    main(AcceleratorBenchmark(out=str(tmp_path), parts=("kernels", "step")))
    assert ran == ["kernels", "step", "step"], "a new process goes on where a device was lost"
    said = capsys.readouterr()
    assert "kernels: the process ended with status -9" in said.err
    assert "kernels: cut after" in said.out and "step: done after" in said.out
