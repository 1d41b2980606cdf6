"""Fine-tuning: only what is meant to move moves, and a run goes on as if it had not stopped."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import BASE, heavy_model, random_tokens

import memgen
from memgen import LoRAConfig, MemGenConfig, WeaverConfig, plan_insertions
from thoughtbubbles import ModelConfig
from train import evaluate, generate, sft
from train.checkpoint import load_params
from train.config import EvalConfig, RunConfig
from train.data import DataConfig
from train.data.chat_data import ChatDataConfig, prepare_chat
from train.finetuning import Finetuning, SFTConfig, checksum, load_writer_on, sft_loss
from train.load import load_model, load_writer
from train.loop import run, train
from train.mesh import MeshConfig, make_mesh, shard_bytes, state_shardings
from train.metrics import read_metrics
from train.optim import OptimizerConfig
from train.scoring import Scorer
from train.tuning import TRAINED, Tuned, one_response_rows

LORA = LoRAConfig(rank=2, alpha=4.0, dropout=0.1, targets=("q", "v", "o", "up", "down"))
MEMORY = MemGenConfig(
    WeaverConfig(2, 2, lora=dataclasses.replace(LORA, targets=("q", "v"))),
    max_inference_events=1,
    insertion="random",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of a few steps."""
    folder = tmp_path_factory.mktemp("base") / "run"
    model = ModelConfig(vocab_size=320, embed_dim=16, num_layers=2, num_heads=2, mlp_dim=32)
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
            batch_size=8,
            out=str(folder),
        )
    )
    return folder


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
    return run(lambda: Finetuning(configured), configured)


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out) if "loss" in line]


@pytest.mark.parametrize("kind", ["all", "lora", "weaver"])
def test_a_run_learns_and_only_what_is_trained_moves(base, chats, tmp_path, kind):
    before = checksum(load_model(base).model)
    held_out = tune(config(base, chats, tmp_path / "run", train=kind, steps=16))
    assert held_out["loss"] < losses(tmp_path / "run")[0]
    assert checksum(load_model(base).model) == before  # the folder it began with is read only
    names = jax.tree_util.tree_leaves_with_path(load_params(tmp_path / "run")[1])
    first = {jax.tree_util.keystr(path[:1], simple=True) for path, _ in names}
    assert first == {{"all": "decoder", "lora": "adapter", "weaver": "memgen"}[kind]}
    if kind != "all":  # nothing of the frozen weights is stored
        assert not any("embed" in jax.tree_util.keystr(path) for path, _ in names)


@pytest.mark.parametrize("kind", ["lora", "weaver"])
def test_a_stopped_run_goes_on_with_the_same_numbers(base, chats, tmp_path, kind):
    """Dropout and random insertion draw from the step, not from what ran before."""
    tune(config(base, chats, tmp_path / "whole", train=kind))
    work = config(base, chats, tmp_path / "parts", train=kind)
    tune(work)
    shutil.rmtree(tmp_path / "parts" / "8")  # as if it had been killed after step 4
    tune(work)
    assert len(losses(tmp_path / "parts")) == 8
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_merged_adapter_is_the_tuned_model(base, chats, tmp_path):
    work = config(base, chats, tmp_path / "run", steps=8)
    tune(work)
    again = Finetuning(work)
    rows = again.inputs(again.prepare().validation.read(np.arange(8)))
    tuned = again._around(load_writer(str(base)).model)
    tuned = memgen.load_params(tuned, load_params(tmp_path / "run")[1], TRAINED["lora"])
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    model = load_writer_on(mesh, str(tmp_path / "run")).model
    assert shard_bytes(nnx.state(model)) < 0.6 * shard_bytes(
        nnx.state(load_writer(str(base)).model)
    )
    tokens = np.maximum(rows["tokens"], 0)
    log_probs = jax.nn.log_softmax(model(jnp.asarray(tokens[:, :-1])), axis=-1)
    expected = np.take_along_axis(np.asarray(log_probs), tokens[:, 1:, None], axis=2)[..., 0]
    expected = np.where(rows["supervised"][:, 1:], expected, 0)
    np.testing.assert_allclose(tuned.log_probs(rows), expected, atol=1e-5)
    unadapted = load_model(base).model(jnp.asarray(tokens[:, :-1]))
    assert np.abs(np.asarray(jax.nn.log_softmax(unadapted, axis=-1) - log_probs)).max() > 1e-3


@pytest.mark.parametrize("kind", ["lora", "weaver"])
def test_meshes_and_parts_change_nothing(base, chats, tmp_path, kind):
    """Without randomness, which differs between micro-batches."""
    still = dataclasses.replace(LORA, dropout=0.0)
    memory = dataclasses.replace(
        MEMORY,
        insertion="first",
        weaver=dataclasses.replace(
            MEMORY.weaver, lora=dataclasses.replace(still, targets=("q", "v"))
        ),
    )
    runs = {
        "one": {},
        "parts": {"accumulate": 2},
        "mesh": {"mesh": MeshConfig(data=2, fsdp=2, tensor=2)},
    }
    found = {}
    for name, changes in runs.items():
        changes = {"lora": still, "memgen": memory} | changes
        tune(config(base, chats, tmp_path / name, train=kind, steps=3, **changes))
        found[name] = losses(tmp_path / name)
    np.testing.assert_allclose(found["parts"], found["one"], rtol=1e-5)
    np.testing.assert_allclose(found["mesh"], found["one"], rtol=1e-5)


def test_each_device_is_given_its_part(base):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    whole, spread = load_writer(str(base)).model, load_writer_on(mesh, str(base)).model
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
        work = Finetuning(config(base, chats, data=data))
        rows = work.prepare().train
        tuned = work.trainable.model(work.first_state().weights)
        batch = work.inputs(next(rows.batches(64)))  # filled up with empty rows
        total, weight, _ = sft_loss(tuned, jax.tree.map(jnp.asarray, batch), None)
        totals.append((float(total), float(weight)))
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)


def test_padding_takes_no_budget_of_a_policy_that_sees_the_whole_row():
    lora = LoRAConfig(rank=2)
    tuned = Tuned(
        heavy_model(BASE), "lora", lora=lora, memgen=MEMORY, boundary=None, rngs=nnx.Rngs(0)
    )
    tokens = random_tokens(1, 9)

    def scored(padding: int) -> jax.Array:
        end = lambda rows, value: jnp.pad(rows, ((0, 0), (0, padding)), constant_values=value)  # noqa: E731
        return tuned.log_probs(
            {
                "tokens": end(tokens, -1),
                "supervised": end(tokens >= 0, False),
                "segment": end(jnp.zeros_like(tokens), -1),
            }
        )

    # One place at least, so that the last token is read in both.
    np.testing.assert_allclose(scored(7)[:, :8], scored(1)[:, :8], atol=1e-5)
    assert (scored(7)[:, 8:] == 0).all()


def test_a_weaver_reads_each_response_in_a_row_of_its_own(base, chats):
    work = Finetuning(config(base, chats, train="weaver"))
    plain = prepare_chat(work.config.data, load_writer(str(base)).tokenizer)
    rows = plain.train
    doubled = dataclasses.replace(rows, supervised=rows.supervised.copy())
    place = np.argmax(doubled.supervised, axis=1)
    doubled.supervised[np.arange(len(rows)), place + 1] = False  # a hole: now two responses
    split = one_response_rows(doubled)
    assert len(split) > len(rows)
    assert split.supervised.sum() == doubled.supervised.sum()
    first = split.supervised[0].argmax()
    assert (split.tokens[0, : first + 1] == rows.tokens[0, : first + 1]).all()
    assert (split.tokens[0, first + 1 :] == -1).all()


def test_a_weavers_loss_is_that_of_its_plan(base, chats):
    work = Finetuning(config(base, chats, train="weaver"))
    rows = jax.tree.map(jnp.asarray, work.inputs(work.prepare().train.read(np.arange(8))))
    tuned = work.trainable.model(work.first_state().weights)
    first = dataclasses.replace(MEMORY, insertion="first")
    tuned.memgen.config = first
    tokens = jnp.maximum(rows["tokens"], 0)
    plan = plan_insertions(tokens, rows["supervised"], tuned.memgen.boundary[...], first)
    assert (plan.point >= 0).sum() > 4  # commas are boundaries
    hidden = tuned.memgen.predictors(tokens, plan)
    logits = jax.nn.log_softmax(tuned.memgen.reasoner.unembed(hidden), axis=-1)
    expected = jnp.take_along_axis(logits, tokens[..., None], axis=2)[..., 0]
    expected = jnp.where(rows["supervised"], expected, 0)[:, 1:]
    np.testing.assert_allclose(tuned.log_probs(rows), expected, atol=1e-5)


def test_generate_says_where_it_remembers(base, chats, tmp_path, capsys):
    tune(config(base, chats, tmp_path / "run", train="weaver"))
    ask = generate.GenerateConfig(
        checkpoint=str(tmp_path / "run"), prompt=("1ab=",), max_new_tokens=6, temperature=0.0
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
    with pytest.raises(ValueError, match="learned trigger is asked for and this MemGen has none"):
        generate.main(dataclasses.replace(ask, memory="learned"))


def test_muon_moves_adapters_and_a_weaver_may_write_only_before_the_answer(base, chats, tmp_path):
    weaver = WeaverConfig(2, 0, lora=LoRAConfig(2, 4.0))
    memory = MemGenConfig(weaver, max_inference_events=0)
    muon = OptimizerConfig(name="muon", learning_rate=1e-2)
    work = config(
        base, chats, tmp_path / "run", train="weaver", memgen=memory, optimizer=muon, steps=2
    )
    tune(work)
    assert load_model(tmp_path / "run").memgen.weaver.inference is None


def test_what_would_drop_the_memory_is_refused(base, chats, tmp_path):
    tune(config(base, chats, tmp_path / "run", train="weaver", steps=2))
    with pytest.raises(ValueError, match="holds a weaver, which fine-tuning would drop"):
        Finetuning(config(tmp_path / "run", chats))
    with pytest.raises(ValueError, match="tasks are scored without latent memory"):
        Scorer(load_model(tmp_path / "run"))
    with pytest.raises(ValueError, match="fine-tuned on chat data.*--tasks FILE"):
        evaluate.main(evaluate.EvaluateConfig(checkpoint=str(tmp_path / "run")))


def test_mistakes_are_one_line(base, chats, tmp_path):
    packed = ChatDataConfig(path=(str(chats),), pack=True)
    with pytest.raises(ValueError, match="data.pack=True: a weaver reads rows of one conversation"):
        Finetuning(config(base, chats, train="weaver", data=packed))
    with pytest.raises(ValueError, match="no map 'w' to adapt: choose targets from"):
        Finetuning(config(base, chats, lora=LoRAConfig(targets=("w",))))
    work = config(base, chats, tmp_path / "run", steps=2)
    tune(work)
    with pytest.raises(ValueError, match="lora.rank: saved 2, now 3"):
        tune(dataclasses.replace(work, lora=dataclasses.replace(LORA, rank=3)))


def test_other_frozen_weights_are_refused(base, chats, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    work = config(tmp_path / "base", chats, tmp_path / "run", steps=2)
    tune(work)
    other = RunConfig(
        model=ModelConfig(vocab_size=320, embed_dim=16, num_layers=2, num_heads=2, mlp_dim=32),
        data=dataclasses.replace(
            DataConfig(), corpus=load_model(base).config["data"]["corpus"], seq_len=16,
            cache_dir=load_model(base).config["data"]["cache_dir"],
        ),
        evaluation=EvalConfig(every=0, rows=4), seed=1, steps=1, batch_size=8,
        out=str(tmp_path / "other"),
    )  # fmt: skip
    train(other)
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "other").rename(tmp_path / "base")
    with pytest.raises(ValueError, match="trained beside weights .* holds"):
        load_model(tmp_path / "run")
    with pytest.raises(ValueError, match="was trained beside weights .*, they are now"):
        tune(dataclasses.replace(work, steps=4))


def test_the_command_trains_a_lora(base, chats, tmp_path, monkeypatch, capsys):
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
    assert "trained are" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("sys.argv", arguments)
    sft.run_command(sft.main, SFTConfig)
    assert load_model(tmp_path / "run").step == 2
