"""Fine-tuning: only what is meant to move moves, and a run goes on as if it had not stopped.

Whole runs on meshes: `python -m pytest -m experiment tests/test_sft.py`.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import BASE, heavy_model, random_tokens

import memgen
from memgen import LoRAConfig, MemGenConfig, WeaverConfig, plan_insertions
from thoughtbubbles import ModelConfig
from train import evaluate, export, generate, sft
from train.data import DataConfig
from train.data.chat_data import ChatDataConfig, one_response, one_response_rows, prepare_chat
from train.devices.mesh import MeshConfig, make_mesh, shard_bytes, state_shardings
from train.engine.config import EvalConfig
from train.engine.loop import run
from train.engine.optim import OptimizerConfig
from train.evaluation.scoring import Scorer
from train.finetuning.battery import BatteryConfig
from train.finetuning.job import SFTConfig, SFTJob, sft_loss
from train.models.finetunable import TRAINED, FinetunableModel
from train.models.load import checksum, load_language_model, load_language_model_on, load_model
from train.pretraining.config import RunConfig
from train.pretraining.job import train
from train.runs.checkpoint import load_params
from train.runs.metrics import read_metrics

LORA = LoRAConfig(rank=2, alpha=4.0, dropout=0.1, targets=("q", "v", "o", "up", "down"))
MEMORY = MemGenConfig(
    WeaverConfig(2, 2, lora=dataclasses.replace(LORA, targets=("q", "v"))),
    max_inference_events=1,
    insertion="random",
)


# A weaver's adapters are moved by Muon here, by Adam elsewhere; others on a mesh and in parts.
OWN = {
    "weaver": {"optimizer": OptimizerConfig("muon", learning_rate=1e-2, weight_decay=0.0)},
    "lora": {"accumulate": 2, "mesh": MeshConfig(data=2, fsdp=2, tensor=2)},
}


@pytest.fixture(scope="module", autouse=True)
def one_device() -> Iterator[None]:
    """Unless a test names a mesh: programs for eight devices take longer to compile."""

    def small(config: MeshConfig, devices: Any = None) -> Any:
        return make_mesh(config, jax.devices()[:1] if config == MeshConfig() else devices)

    with pytest.MonkeyPatch.context() as patch:
        for module in ("train.finetuning.job", "train.pretraining.job"):
            patch.setattr(f"{module}.make_mesh", small)
        yield


@pytest.fixture(scope="module")
def base(one_device: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of a few steps, and one of fewer beside it."""
    folder = tmp_path_factory.mktemp("base") / "run"
    model = ModelConfig(vocab_size=320, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=32)
    text = tmp_path_factory.mktemp("text")
    for number in range(40):
        (text / f"{number}.txt").write_text(f"{number} says: a, b. " * 9)
    train(
        RunConfig(
            model=model,
            data=DataConfig(corpus=str(text), seq_len=16, cache_dir=str(text / "cache")),
            optimizer=OptimizerConfig(learning_rate=1e-2),
            evaluation=EvalConfig(every=0, rows=4),
            steps=3,
            save_every=2,
            batch_size=8,
            out=str(folder),
        )
    )
    return folder


@pytest.fixture(scope="module")
def base_sum(base: Path) -> str:
    """Before anything was tuned beside it."""
    return checksum(load_model(base).model)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rng = np.random.default_rng(0)
    lines = []
    for number in range(64):
        words = "".join(rng.choice(list("abcdef"), rng.integers(1, 5)))
        lines.append(json.dumps({"prompt": f"{number}{words}=", "completion": f"{words}, ok."}))
    file.write_text("\n".join(lines))
    return file


def config(base: Path, chats: Path, out: Path | str = "unused", **changes: Any) -> SFTConfig:
    changes = {"train": "lora"} | changes
    data = ChatDataConfig(path=(str(chats),), validation=0.2, seq_len=24)
    return SFTConfig(
        **{
            "weights": str(base),
            "data": data,
            "lora": LORA,
            "memgen": MEMORY,
            "optimizer": OptimizerConfig(learning_rate=1e-2, weight_decay=0.0),
            "evaluation": EvalConfig(every=0, rows=8),
            "steps": 8,
            "batch_size": 16,
            "save_every": 4,
            "log_every": 1,
            "out": str(out),
            **changes,
        }
    )


def tune(configured: SFTConfig) -> dict[str, float]:
    return run(lambda: SFTJob(configured), configured)


@pytest.fixture(scope="module")
def whole(
    base: Path, base_sum: str, chats: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, dict[str, float]]]:
    """The folder of a whole run, which tests only read, and its last held-out metrics."""

    @functools.cache
    def run(kind: str) -> tuple[Path, dict[str, float]]:
        out = tmp_path_factory.mktemp("whole") / kind
        return out, tune(config(base, chats, out, train=kind, **OWN.get(kind, {})))

    return run


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out) if "loss" in line]


@jax.jit
def log_probs_of(finetunable: FinetunableModel, rows: dict[str, Any]) -> jax.Array:
    return finetunable.log_probs(rows)


@pytest.mark.parametrize("kind", ["all", "lora", "weaver"])
def test_a_run_learns_and_only_what_is_trained_moves(base, base_sum, whole, kind):
    out, held_out = whole(kind)
    assert held_out["loss"] < losses(out)[0]
    if kind == "lora":  # on a mesh and in parts; it begins as the base
        assert losses(out)[0] == pytest.approx(losses(whole("all")[0])[0], rel=1e-5)
    assert checksum(load_model(base).model) == base_sum  # what it began with is read only
    names = jax.tree_util.tree_leaves_with_path(load_params(out)[1])
    first = {jax.tree_util.keystr(path[:1], simple=True) for path, _ in names}
    assert first == {{"all": "model", "lora": "adapter", "weaver": "memgen"}[kind]}
    if kind != "all":  # nothing of the frozen weights is stored
        assert not any("embed" in jax.tree_util.keystr(path) for path, _ in names)


@pytest.mark.parametrize("kind", [pytest.param("lora", marks=pytest.mark.experiment), "weaver"])
def test_a_stopped_run_goes_on_with_the_same_numbers(base, chats, whole, tmp_path, kind):
    """Dropout and random insertion draw from the step, not from what ran before."""
    parts = tmp_path / "parts"
    shutil.copytree(whole(kind)[0], parts)
    shutil.rmtree(parts / "8")  # as if it had been killed after step 4
    tune(config(base, chats, parts, train=kind, **OWN.get(kind, {})))
    assert (parts / "8").exists() and len(losses(parts)) == 8
    assert losses(parts) == losses(whole(kind)[0])


def test_a_merged_adapter_is_the_tuned_model(base, chats, whole):
    out, _ = whole("lora")
    again = SFTJob(config(base, chats, out))
    rows = again.inputs(again.prepare().validation.read(np.arange(8)))
    finetunable = again._around(load_language_model(str(base)).model)
    finetunable = memgen.load_params(finetunable, load_params(out)[1], TRAINED["lora"])
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    model = load_language_model_on(mesh, str(out)).model
    before = load_language_model(str(base)).model
    assert shard_bytes(nnx.state(model)) < 0.6 * shard_bytes(nnx.state(before))
    tokens = np.maximum(rows["tokens"], 0)
    log_probs = jax.jit(lambda model: jax.nn.log_softmax(model(tokens[:, :-1]), axis=-1))
    merged, unadapted = (np.asarray(log_probs(each)) for each in (model, before))
    expected = np.take_along_axis(merged, tokens[:, 1:, None], axis=2)[..., 0]
    expected = np.where(rows["loss_mask"][:, 1:], expected, 0)
    np.testing.assert_allclose(log_probs_of(finetunable, rows), expected, atol=1e-5)
    assert np.abs(unadapted - merged).max() > 1e-3


def test_the_adapter_of_a_run_is_exported_for_peft(base, chats, whole, tmp_path, capsys):
    out, _ = whole("lora")
    export.main(export.ExportConfig(run=str(out), to=str(tmp_path / "low"), adapter_only=True))
    assert f"--model {base} --adapter {tmp_path / 'low'}" in capsys.readouterr().out
    loaded = load_language_model(str(base)).with_adapter(str(tmp_path / "low")).model
    expected = load_language_model(str(out)).model
    before = load_language_model(str(base)).model
    states = [jax.tree.leaves(nnx.state(model)) for model in (loaded, expected, before)]
    for a, b in zip(*states[:2], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(states[0], states[2], strict=True))
    fields = json.loads((tmp_path / "low/adapter_config.json").read_text())
    assert (fields["r"], fields["base_model_name_or_path"]) == (LORA.rank, str(base))
    with pytest.raises(ValueError, match="trained 'weaver', not a LoRA adapter: leave"):
        export.export_adapter(whole("weaver")[0], tmp_path / "other")
    with pytest.raises(ValueError, match="format=auto, dtype=bfloat16: an adapter has"):
        export.ExportConfig(run="a", to="b", adapter_only=True, dtype="bfloat16")


@pytest.mark.experiment
@pytest.mark.parametrize("kind", ["lora", "weaver"])
def test_meshes_and_parts_change_nothing(base, chats, tmp_path, kind):
    """Without randomness, which differs between micro-batches.

    A weaver here may write only before the answer.
    """
    still = dataclasses.replace(LORA, dropout=0.0)
    weaver = WeaverConfig(2, 0, lora=dataclasses.replace(still, targets=("q", "v")))
    memory = MemGenConfig(weaver, max_inference_events=0, insertion="first")
    both = {"accumulate": 2, "mesh": MeshConfig(data=2, fsdp=2, tensor=2)}
    found = {}
    for name, changes in {"one": {}, "both": both}.items():
        changes = {"lora": still, "memgen": memory} | changes
        tune(config(base, chats, tmp_path / name, train=kind, steps=3, **changes))
        found[name] = losses(tmp_path / name)
    np.testing.assert_allclose(found["both"], found["one"], rtol=1e-5)
    if kind == "weaver":
        assert load_model(tmp_path / "both").memgen.weaver.inference is None


def test_each_device_is_given_its_part(base):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    whole, spread = (
        load_language_model(str(base)).model,
        load_language_model_on(mesh, str(base)).model,
    )
    expected = jax.tree.leaves(state_shardings(nnx.state(whole), mesh))
    leaves = [jax.tree.leaves(nnx.state(model)) for model in (whole, spread)]
    for one, part, sharding in zip(*leaves, expected, strict=True):
        assert part.sharding == sharding
        np.testing.assert_array_equal(part, one)
    assert shard_bytes(nnx.state(spread)) < 0.3 * shard_bytes(nnx.state(whole))
    assert checksum(spread) == checksum(whole)


def test_packing_changes_no_loss(base, chats):
    """All conversations in few rows or in a row each: the same sum of nats."""
    totals = []
    for pack in (False, True):
        data = ChatDataConfig(path=(str(chats),), validation=0.2, seq_len=64, pack=pack)
        work = SFTJob(config(base, chats, data=data))
        rows = work.prepare().train
        finetunable = work.trainable.model(work.first_state().variables)
        batch = work.inputs(next(rows.batches(64)))  # filled up with empty rows
        total, weight = jax.jit(lambda *given: sft_loss(*given, None)[:2])(finetunable, batch)
        totals.append((float(total), float(weight)))
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)


@pytest.mark.parametrize("kind", ["lora", "weaver"])
def test_rows_as_long_as_their_longest_change_no_loss(base, chats, monkeypatch, kind):
    memory = dataclasses.replace(MEMORY, insertion="first")
    work = SFTJob(config(base, chats, train=kind, memgen=memory))
    rows = work.prepare().train
    monkeypatch.setattr("train.data.chat_data.SHORTEST_ROW", 4)
    shortest = np.argsort(rows.lengths)[:4]
    variables = work.first_state().variables
    short, long = (
        work._score(variables, work.inputs(rows.read(shortest, width)))
        for width in (None, rows.seq_len)
    )
    assert rows.width(shortest) < rows.seq_len
    np.testing.assert_allclose(short["nats"], long["nats"], rtol=1e-5)
    np.testing.assert_array_equal(short["count"], long["count"])


def test_padding_takes_no_budget_of_a_policy_that_sees_the_whole_row():
    model = heavy_model(dataclasses.replace(BASE, num_layers=1, fork_layers=(0,)))
    lora = LoRAConfig(rank=2)
    finetunable = FinetunableModel(
        model, "lora", lora=lora, memgen=MEMORY, boundary=None, rngs=nnx.Rngs(0)
    )
    tokens = np.asarray(random_tokens(1, 9))

    def scored(padding: int) -> np.ndarray:
        end = lambda rows, value: np.pad(rows, ((0, 0), (0, padding)), constant_values=value)  # noqa: E731
        rows = {
            "tokens": end(tokens, -1),
            "loss_mask": end(tokens >= 0, False),
            "segment": end(np.zeros_like(tokens), -1),
        }
        return np.asarray(log_probs_of(finetunable, rows))

    # One place at least, so that the last token is read in both.
    long, short = scored(7), scored(1)
    np.testing.assert_allclose(long[:, :8], short[:, :8], atol=1e-5)
    assert (long[:, 8:] == 0).all()


def test_a_weaver_reads_each_response_in_a_row_of_its_own(base, chats):
    work = SFTJob(config(base, chats, train="weaver"))
    plain = prepare_chat(work.config.data, load_language_model(str(base)).tokenizer)
    rows = plain.train
    doubled = dataclasses.replace(rows, loss_mask=rows.loss_mask.copy())
    place = np.argmax(doubled.loss_mask, axis=1)
    doubled.loss_mask[np.arange(len(rows)), place + 1] = False  # a hole: now two responses
    split = one_response_rows(doubled, ())
    assert len(split) > len(rows)
    assert split.loss_mask.sum() == doubled.loss_mask.sum()
    first = split.loss_mask[0].argmax()
    assert (split.tokens[0, : first + 1] == rows.tokens[0, : first + 1]).all()
    assert (split.tokens[0, first + 1 :] == -1).all()
    counted = one_response(dataclasses.replace(plain, train=doubled)).statistics["train"]
    tokens = (split.tokens >= 0).sum()
    assert counted == plain.statistics["train"] | {"rows": len(split), "tokens": tokens}
    assert work.prepare().statistics == plain.statistics, "one response each"


def test_a_weavers_loss_is_that_of_its_plan(base, chats):
    work = SFTJob(config(base, chats, train="weaver"))
    rows = work.inputs(work.prepare().train.read(np.arange(8)))
    finetunable = work.trainable.model(work.first_state().variables)
    first = dataclasses.replace(MEMORY, insertion="first")
    finetunable.memgen.config = first
    tokens = np.maximum(rows["tokens"], 0)

    @jax.jit
    def expected_of(woven, loss_mask):
        plan = plan_insertions(tokens, loss_mask, woven.boundary[...], first)
        logits = woven.reasoner.unembed(woven.predictors(tokens, plan))
        return plan.point, jax.nn.log_softmax(logits, axis=-1)

    point, log_probs = map(np.asarray, expected_of(finetunable.memgen, rows["loss_mask"]))
    assert (point >= 0).sum() > 4  # commas are boundaries
    expected = np.take_along_axis(log_probs, tokens[..., None], axis=2)[..., 0]
    expected = np.where(rows["loss_mask"], expected, 0)[:, 1:]
    np.testing.assert_allclose(log_probs_of(finetunable, rows), expected, atol=1e-5)


def test_generate_says_where_it_remembers(base, whole, capsys):
    ask = generate.GenerateConfig(
        checkpoint=str(whole("weaver")[0]), prompt=("1ab=",), max_new_tokens=6, temperature=0.0
    )
    generate.main(ask)
    assert "memory before new tokens 0" in capsys.readouterr().err
    generate.main(dataclasses.replace(ask, memory="never"))
    never = capsys.readouterr()
    assert "none" in never.err
    generate.main(dataclasses.replace(ask, checkpoint=str(base)))
    assert capsys.readouterr().out == never.out
    with pytest.raises(ValueError, match="top_k is not offered with latent memory"):
        generate.main(dataclasses.replace(ask, top_k=3))
    with pytest.raises(ValueError, match="needs a learned trigger and this MemGen has none"):
        generate.main(dataclasses.replace(ask, memory="learned"))


def test_what_would_drop_the_memory_is_refused(chats, whole):
    woven, _ = whole("weaver")
    with pytest.raises(ValueError, match="holds a weaver, which fine-tuning would drop"):
        SFTJob(config(woven, chats))
    with pytest.raises(ValueError, match="tasks are scored without latent memory"):
        Scorer(load_model(woven))
    with pytest.raises(ValueError, match="fine-tuned on chat data.*--tasks FILE"):
        evaluate.main(evaluate.EvaluateConfig(checkpoint=str(woven)))


def test_mistakes_are_one_line(base, chats, whole):
    packed = ChatDataConfig(path=(str(chats),), pack=True)
    with pytest.raises(ValueError, match="data.pack=True: a weaver reads rows of one conversation"):
        SFTJob(config(base, chats, train="weaver", data=packed))
    with pytest.raises(ValueError, match="no linear layer 'w': choose targets from"):
        SFTJob(config(base, chats, lora=LoRAConfig(targets=("w",))))
    work = config(base, chats, whole("lora")[0])
    with pytest.raises(ValueError, match="lora.rank: saved 2, now 3"):
        tune(dataclasses.replace(work, lora=dataclasses.replace(LORA, rank=3)))


@pytest.fixture
def other_base(base: Path, tmp_path: Path) -> Iterator[None]:
    """In the place of the base the one of fewer steps, until the test is over."""
    shutil.copytree(base, tmp_path / "right")
    shutil.rmtree(base / "3")
    yield
    shutil.rmtree(base)
    shutil.copytree(tmp_path / "right", base)


def test_other_frozen_weights_are_refused(base, chats, whole, request):
    out, _ = whole("lora")
    assert load_model(out).step == 8
    request.getfixturevalue("other_base")
    with pytest.raises(ValueError, match="trained with frozen weights .* holds"):
        load_model(out)
    with pytest.raises(ValueError, match="was trained with frozen weights .*, they are now"):
        tune(config(base, chats, out, steps=9))


def test_a_penalty_holds_the_model_near_its_beginning(base, base_sum, chats, whole, tmp_path):
    """And variants of an environment are scored beside it; a stopped run goes on."""
    variants = BatteryConfig("sokoban_variants", ("id", "fake_cardinal"), 2, 1, 4)
    work = config(base, chats, tmp_path / "kl", train="all", kl=20.0, battery=variants, steps=4,
                  save_every=3)  # fmt: skip
    held_out = tune(work)
    assert checksum(load_model(base).model) == base_sum
    lines = [line for line in read_metrics(tmp_path / "kl") if "loss" in line]
    free = losses(whole("all")[0])
    assert lines[0]["ref_kl"] == pytest.approx(0, abs=1e-6)
    assert lines[0]["loss"] == pytest.approx(free[0], rel=1e-5)
    for line in lines[2:]:  # the learning rate of the first step is 0
        assert 0 < line["ref_kl"] < 0.1
    for name in ("id", "fake_cardinal"):  # prompts of about one length: one program
        assert held_out[f"battery/{name}/success"] == held_out[f"battery/{name}/validity"] == 0
    shutil.rmtree(tmp_path / "kl" / "4")
    tune(dataclasses.replace(work, battery=BatteryConfig()))
    assert losses(tmp_path / "kl") == [line["loss"] for line in lines]
    assert load_model(tmp_path / "kl").step == 4


def test_mistakes_of_penalty_and_battery_are_one_line(base, chats):
    for changes, message in (
        ({"kl": -1.0}, "kl=-1.0: choose 0 or more"),
        ({"kl": 0.1, "train": "weaver"}, "kl=0.1 is of a decoder's own predictions"),
        ({"battery": BatteryConfig("arithmetic")}, "arithmetic has no variants of its prompt"),
        ({"battery": BatteryConfig("general_points", ("six",))}, "unknown variant 'six'"),
    ):
        with pytest.raises(ValueError, match=message):
            SFTJob(config(base, chats, **changes))


@pytest.mark.parametrize("runs", [False, pytest.param(True, marks=pytest.mark.experiment)])
def test_the_command_trains_a_lora(base, chats, tmp_path, monkeypatch, capsys, runs):
    arguments = [
        "sft",
        "--weights",
        str(base),
        "--data.path",
        str(chats),
        "--data.seq-len",
        "24",
    ]
    arguments += ["--steps", "2", "--batch-size", "8", "--out", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", [*arguments, "--dry-run"])
    sft.run_command(sft.main, SFTConfig)
    shown = capsys.readouterr().out
    assert "trained are" in shown and "conversations to train on" in shown
    assert not (tmp_path / "run").exists()
    if runs:
        monkeypatch.setattr("sys.argv", arguments)
        sft.run_command(sft.main, SFTConfig)
        assert load_model(tmp_path / "run").step == 2
