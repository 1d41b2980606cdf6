"""The experiments: their tasks are what they say, and their runs can be interrupted."""

import dataclasses
import functools
import importlib
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import ROOT
from tiny import SMALL, quick_model, random_tokens

from thoughtbubbles import ModelConfig, PrefixRank, Streams, Threshold, TopK
from thoughtbubbles.bubbles import bubble_map
from thoughtbubbles.forking import candidates_of
from train.cli.main import EXPERIMENTS
from train.devices.mesh import make_mesh
from train.experiments import (
    broadening,
    memory,
    precision,
    quality,
    random_bits,
    retrofit,
    study,
    synthesis,
)
from train.experiments.study import (
    Results,
    StudyConfig,
    by_key,
    markdown_table,
    mean_text,
    read_results,
)
from train.experiments.tasks import Lookup
from train.pretraining.presets import PRESETS
from train.runs.appended import append_objects, begins_with, drop_half_line


def test_lookup_rows_by_hand():
    task = Lookup(offsets=(1, 4), ask=0.5, seq_len=9)
    rows = task.rows(np.random.default_rng(0), 20)
    assert rows.shape == (20, 10) and rows.dtype == np.int32
    tokens, answers = rows % task.vocab_size, rows // task.vocab_size - 1
    for row in range(20):
        for at in range(9):
            if tokens[row, at] < 2:
                assert answers[row, at + 1] == -1, "no question, no answer"
                continue
            back = [tokens[row, at - offset] & 1 if at >= offset else 0 for offset in (1, 4)]
            assert answers[row, at + 1] == back[0] + 2 * back[1]
    assert (task.is_question(rows) == (tokens[:, :-1] >= 2)).all()
    assert task.chance == pytest.approx((8 + 5) / 9 * math.log(2))


def test_precision_scores_what_the_model_does():
    model = quick_model(dataclasses.replace(SMALL, policy=PrefixRank(1.5)))
    tokens = np.asarray(random_tokens(precision.BATCH, 11))
    nats, streams = precision.scores(model, tokens)
    np.testing.assert_array_equal(nats, jax.jit(lambda m, t: m.token_losses(t)[0])(model, tokens))
    for row in (0, 5):
        found = bubble_map(model, tokens[row, :-1].tolist(), ["a"] * 10)
        after = [found.streams[layer] for layer in found.fork_layers]
        np.testing.assert_array_equal(streams[row], after)
    assert streams.shape == (8, len(SMALL.fork_layers), 10) and streams.max() > 1
    run = {"variant": "plain", "seed": 0, "steps": 2, "rows": 8, "loss": 2.0, "added": -0.001}
    run |= {"added_error": 0.0002, "size_of_added": 0.01, "rows_elsewhere": 3}
    run |= {"tokens_elsewhere": 0.005}
    lines = precision.report([run, run | {"variant": "threshold"}]).splitlines()
    assert lines[2] == "| plain | 0 | 2.0000 | -0.00100 ± 0.00020 | 0.01000 |  |  |"
    assert lines[3].endswith("| 3 of 8 | 0.50% |")


@pytest.mark.parametrize("meta", [None, {"step": 3}])
def test_a_run_that_a_signal_stopped_is_no_result(meta, monkeypatch):
    config = dataclasses.replace(PRESETS["tiny_plain"], steps=4)
    monkeypatch.setattr(study, "load_run_meta", lambda folder: meta)
    monkeypatch.setattr(precision, "train", lambda config: {})
    monkeypatch.setattr(precision, "load_model", lambda folder: pytest.fail("it is scored"))
    with pytest.raises(SystemExit, match="1"):
        precision.train_and_score(config, 8)
    if meta is not None:
        study.check_finished("run", meta["step"])


def test_the_random_control_ignores_scores():
    @jax.jit
    def kept(scores):
        streams = Streams.start(jnp.zeros((3, 10, 4)))
        return quality.RandomForks(1.5).keep(candidates_of(streams, scores))

    scores = -np.random.default_rng(0).random((2, 3, 20), np.float32)
    masks = [np.asarray(kept(some)) for some in scores]
    assert (masks[0] == masks[1]).all()
    assert masks[0][:, 1::2].all(), "originals live"
    assert 10 < masks[0][0].sum() <= 15
    variant = quality.VARIANTS["random"](PRESETS["tiny_plain"].model)
    assert variant.policy == quality.RandomForks(quality.RATIO)


def test_finished_runs_are_found_again(tmp_path):
    out = tmp_path / "new" / "results.jsonl"
    results = Results(out, ("arm", "seed"))
    run = {"arm": "a", "seed": 0}
    assert results.missing([run]) == [run] and not out.parent.exists()
    results.add(run | {"loss": 1.5})
    again = Results(out, ("arm", "seed"))
    for found in (results, again):
        assert found.missing([run]) == [] and run in found and run | {"note": "unread"} in found
        assert run | {"seed": 1} not in found and run | {"arm": "b"} not in found
    assert again.found == read_results(out) == [run | {"loss": 1.5}]
    out.write_text(out.read_text().rstrip("\n"))  # as some editors save it
    again.add(run | {"seed": 1})
    assert read_results(out) == again.found and len(again.found) == 2
    whole = out.read_text()
    out.write_text(whole + '{"arm": "c", "se')  # by a kill, or a full disk
    assert read_results(out) == again.found
    assert Results(out, ("arm", "seed")).found == again.found and out.read_text() == whole
    out.write_text(half := '{"question": "?"}\n{"question')  # not of an experiment
    with pytest.raises(ValueError, match="line 2: not JSON"):
        Results(out, ("arm", "seed"))
    assert out.read_text() == half
    for half, left in (
        ('{"se', ""),  # the first result, whatever its first entry
        ('{"arm": "a", "seed": 0, "lo', ""),
        ('{"arm": "a"}\n{"arm": "b', '{"arm": "a"}\n'),  # which lacks an entry
    ):
        out.write_text(half)
        Results(out, ("arm", "seed"))
        assert out.read_text() == left
    for text in ("notes", '{"arm": "a"}\n{"arm\n', '{"arm": "a"}\n{"arm\n{"ar', "[{}, 3]"):
        (file := out.with_suffix(".json")).write_text(text)
        with pytest.raises(ValueError, match="not JSON|not an object"):
            read_results(file)


def test_the_last_line_of_files_that_are_appended_to(tmp_path):
    """One rule: whole objects stay, halves of own lines go, other text begins no joined line."""
    file, is_own = tmp_path / "file", begins_with(b'{"own": ')
    first, other, added = '{"own": 1}\n', "notes\n", '{"new": 2}\n'
    for text, kept, appended in (
        ("", "", added),
        (first, first, first + added),
        (first + '{"a": [', first, first + added),
        (first + '{"a": []}', first + '{"a": []}', first + '{"a": []}\n' + added),
        (first + "3", first, first + added),
        ('{"ow', "", added),
        (first[:-1], first[:-1], first + added),
        (other + '{"own": ', other + '{"own": ', other + '{"own": \n' + added),
        ("notes", "notes", other + added),
    ):
        file.write_text(text)
        drop_half_line(file, is_own)
        assert file.read_text() == kept
        append_objects(file, [{"new": 2}], is_own)
        assert file.read_text() == appended
    drop_half_line(tmp_path / "none", is_own)
    assert not (tmp_path / "none").exists()


def test_means_have_their_standard_errors():
    values = [1.0, 2.0, 6.0]
    assert mean_text(values, 2) == f"3.00 ± {math.sqrt((4 + 1 + 9) / 2 / 3):.2f}"
    assert mean_text(values, 0, "+").startswith("+3 ±")
    assert mean_text([2.0], 1) == "2.0" and mean_text([], 1) == ""


def test_tables_group_runs_in_the_order_of_the_first_ones():
    runs = [{"arm": arm, "seed": seed} for arm, seed in (("b", 0), ("a", 0), ("b", 1))]
    groups = by_key(runs, "arm")
    assert groups == {("b",): [runs[0], runs[2]], ("a",): [runs[1]]}
    assert markdown_table(("x", "y"), [("1", "2")]) == ["| x | y |", "|---|---|", "| 1 | 2 |"]


def with_one_fork(variant: Callable[[ModelConfig], ModelConfig]):
    def small(base: ModelConfig) -> ModelConfig:
        config = variant(base)
        return dataclasses.replace(config, num_layers=2, fork_layers=config.fork_layers[:1])

    return small


@pytest.mark.slow
def test_quality_runs_are_resumed_and_reported(tmp_path, capsys, monkeypatch):
    one_device = functools.partial(make_mesh, devices=jax.devices()[:1])  # compiles sooner
    monkeypatch.setattr(quality, "make_mesh", one_device)
    for name in ("plain", "topk"):
        monkeypatch.setitem(quality.VARIANTS, name, with_one_fork(quality.VARIANTS[name]))
    out = tmp_path / "quality.jsonl"
    config = quality.Quality(
        task="lookup",
        variants=("plain", "topk"),
        seeds=(0,),
        steps=2,
        rows=4,
        positions=6,
        out=str(out),
    )
    quality.main(config)
    lines = out.read_text().splitlines()
    results = {json.loads(line)["variant"]: json.loads(line) for line in lines}
    assert set(results) == {"plain", "topk"}
    assert all(np.isfinite(result["loss"]) for result in results.values())
    assert "blockwise_loss" in results["topk"] and "blockwise_loss" not in results["plain"]
    quality.main(config)
    assert out.read_text().splitlines() == lines, "what is finished is not run again"
    capsys.readouterr()
    quality.main(quality.Quality(report=str(out)))
    table = capsys.readouterr().out
    assert "| plain | 27,520 | 0 |" in table
    assert f"{results['topk']['loss'] - results['plain']['loss']:+.4f}" in table
    quality.main(quality.Quality(report=str(out), against="topk"))
    table = capsys.readouterr().out
    assert f"{results['plain']['loss'] - results['topk']['loss']:+.4f}" in table


def test_an_unknown_variant_is_named():
    with pytest.raises(ValueError, match="unknown variant 'best': choose from plain, copy2"):
        quality.Quality(variants=("plain", "best"))


@pytest.mark.experiment
@pytest.mark.parametrize("policy", [TopK(1.5), Threshold(1.5), PrefixRank(1.5)], ids=str)
def test_no_causal_policy_beats_a_coin(policy):
    """With heavy weights: TopK's two losses differ; the others' are one, and above ln 2."""
    config = random_bits.RandomBits(length=3, steps=20, batch_size=16)
    model = dataclasses.replace(random_bits.model_config(policy), num_layers=1, fork_layers=(0,))
    trainable, state = random_bits.trained(model, config, seed=0)
    rng = np.random.default_rng(0)
    noisy = lambda leaf: np.asarray(leaf + 0.3 * rng.normal(size=leaf.shape), leaf.dtype)  # noqa: E731
    variables = jax.tree.map(noisy, jax.device_get(state.variables))
    scores = random_bits.all_strings(trainable, state.with_variables(variables), config.length)
    if policy.causal:
        assert scores["parallel"] == pytest.approx(scores["prefix_only"], abs=1e-5)
        assert scores["parallel"] > math.log(2) - 1e-6
    else:
        assert abs(scores["parallel"] - scores["prefix_only"]) > 1e-4


def test_files_that_are_no_results_are_one_line(tmp_path):
    from train.experiments import environments, needle

    file = tmp_path / "results.jsonl"
    for content, reason in (("", ": name a file"), ('{"task": 3}', " of this .* lacks '")):
        file.write_text(content)
        for module in (quality, precision, needle, broadening):
            config = next(iter(module.main.__annotations__.values()))
            with pytest.raises(ValueError, match=rf"{file} has no results{reason}"):
                module.main(config(report=str(file)))
    with pytest.raises(ValueError, match="episodes=0 is below 1"):
        environments.Experiment(arms=("grpo",), episodes=0)
    assert retrofit.Retrofit(layers=(0, 10)).layers == (0, 10), "indices count from 0"
    with pytest.raises(ValueError, match="layers=-1 is below 0"):
        retrofit.Retrofit(layers=(-1,))
    with pytest.raises(ValueError, match="is no folder: choose another place"):
        study.Results(file / "below/out.jsonl", ("seed",))


# Options of a study that are no setting of its results: names of files, and what runs count.
NO_SETTINGS = {"out", "report", "figure", "save", "runs"}
IN_RUNS = {
    "quality": {"against"},  # of the report
    "secrets": {"secrets", "soft_steps", "full_steps", "weaver_steps"},  # "number" and "steps"
    "synthesis": set(synthesis.SHARED),  # checked by itself
}


def studies() -> dict[str, Any]:
    modules = {name: importlib.import_module(f"train.experiments.{name}") for name in EXPERIMENTS}
    return {name: module for name, module in modules.items() if hasattr(module, "run_study")}


@pytest.mark.parametrize("name", studies())
def test_each_option_tells_runs_apart_or_is_shared(name: str, monkeypatch):
    """Otherwise a call with another value would be answered by results of before."""
    module, given = studies()[name], []
    monkeypatch.setattr(module, "run_study", lambda *parts: given.extend(parts))
    [kind] = [
        each for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, StudyConfig)
        and each.__module__ == module.__name__
    ]  # fmt: skip
    module.main(kind())
    _, key, _, _, *settings = given
    known = {*key, *(settings[0] if settings else ()), *NO_SETTINGS, *IN_RUNS.get(name, ())}
    options = {
        field.name for field in dataclasses.fields(kind) if not isinstance(field.default, tuple)
    }
    assert options <= known


def test_results_of_other_settings_are_refused(tmp_path):
    out = str(tmp_path / "memory.jsonl")
    train = lambda config, results: iter([({"arm": "a", "seed": 0}, "done")])  # noqa: E731
    how = ("arm", "seed"), train, lambda results: "", ("steps", "learning_rate")
    study.run_study(memory.Experiment(out=out), *how)
    [found] = read_results(out)
    assert found["settings"] == {"steps": 600, "learning_rate": 0.01}
    study.run_study(memory.Experiment(out=out), *how)
    with pytest.raises(ValueError, match="has results of steps=600, now it is 5: choose another"):
        study.run_study(memory.Experiment(out=out, steps=5), *how)
    assert len(read_results(out)) == 2


def test_a_run_that_a_file_has_twice_counts_once(tmp_path):
    file = tmp_path / "memory.jsonl"
    run = {"arm": "lora", "parameters": 1, "loss": 1.0, "seconds": 1.0}
    lines = [json.dumps(run | {"seed": n, "accuracy": 0.5 + 0.2 * n}) + "\n" for n in (0, 1)]
    for times in (1, 2):
        file.write_text("".join(lines * times))
        shown = study.report_text(file, ("arm", "seed"), memory.report).splitlines()[-1]
        assert shown == "| lora | 1 | 0 1 | 60.0 ± 10.0 | 1.000 | 1 |"


def test_a_retrofit_goes_on(tmp_path, monkeypatch):
    for name in ("load_pretrained", "find_weights", "prepare_data"):
        monkeypatch.setattr(retrofit, name, lambda *_: None)
    scores = {"loss_before": 2.0, "loss": 1.0, "cpu_seconds": 1.0}
    monkeypatch.setattr(retrofit, "train_and_score", lambda *_: scores)
    config = retrofit.Retrofit(seeds=(0,), variants=("plain",), out=str(tmp_path / "some.jsonl"))
    retrofit.main(config)
    retrofit.main(dataclasses.replace(config, seeds=(0, 1)))
    assert [found["seed"] for found in read_results(config.out)] == [0, 1]
    with pytest.raises(ValueError, match="has results of rows=32, now it is 8: choose another"):
        retrofit.main(dataclasses.replace(config, rows=8))


@pytest.mark.parametrize("name", ["needle", "precision", "synthesis"])
def test_reports_keep_runs_of_other_settings_apart(name: str):
    """A line of a run stays the same, whatever runs stand beside it, but for the option's name."""
    report = importlib.import_module(f"train.experiments.{name}").report
    results = read_results(ROOT / "docs" / "results" / f"{name}.jsonl")[:1]
    option = "supervised" if name == "needle" else "steps"
    other = results[0] | {option: 7}
    alone, both = report(results).splitlines(), report([*results, other]).splitlines()
    assert len(both) == len(alone) + 1
    mark = f" ({option} {results[0][option]})"
    assert mark in both[-2] and both[-2].replace(mark, "") == alone[-1]
    assert f" ({option} 7)" in both[-1]


def test_simulations_of_other_settings_are_kept_apart():
    run = {"rollouts": 4, "seed": 0, "tokens": 9, "correct": 2, "steps": 3, "before": 0.1}
    run |= {"after": 0.2, "worst": 0.0, "improved": 1.0, "curve": [[0, 0.1], [3, 0.2]]}
    found = [run, run | {"seed": 1}, run | {"steps": 5, "curve": [[0, 0.1], [5, 0.2]]}]
    lines = broadening.report(found).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| 4 (steps 3)", "| 4 (steps 5)"]
    assert lines[0].endswith("| 0 1 |") and lines[1].endswith("| 0 |")
