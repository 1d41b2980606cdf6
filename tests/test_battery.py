"""The battery and rejection sampling with policies that are scripts; the KL penalty's numbers."""

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rl_tiny import finetunable, language_model

from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from train import battery as command
from train.data import ByteTokenizer
from train.finetuning import battery
from train.finetuning.battery import BatteryConfig, battery_metrics, readable_battery
from train.finetuning.divergence import reference_kl
from train.rl import rejection
from train.rl.environments.sokoban_variants import STEPS
from train.rl.named_tasks import make_task
from train.rl.rollout.formatter import PromptFormatter
from train.rl.rollout.sampler import Sampled
from train.rl.rollout.strategies import Turns

LM = language_model("shallow")
END = ByteTokenizer.separator


class Scripted:
    """A sampler whose policy is a function of the text of the prompt and the number of the row.

    A response that ends in dots was cut.
    """

    max_rows = 7

    def __init__(self, act):
        self._act, self.seen = act, []

    def open(self, prompts, source, keys, more_tokens, responses=1) -> Any:
        texts = [LM.tokenizer.decode(list(prompt)[1:]) for prompt in prompts]
        self.seen += texts
        rows = [self._act(texts[index], row) for row, index in enumerate(source)]
        return SimpleNamespace(respond=lambda limit, active=None: [self._said(t) for t in rows])

    def _said(self, text: str) -> Sampled:
        ids = [*LM.tokenizer.encode(text)[0], END]
        ids = np.array(ids[:-1] if text.endswith("...") else ids, np.int32)
        return Sampled(ids, np.zeros(len(ids), np.float32), np.full(len(ids), -1, np.int8))


def scores(act, monkeypatch, **config: Any) -> dict[str, battery.VariantScore]:
    """Scores of a script on the variants of a battery."""
    sampler = Scripted(act)
    monkeypatch.setattr(battery, "Sampler", lambda *_: sampler)
    policy: Any = SimpleNamespace(config=battery.NO_MEMORY)
    found = battery.play_battery(policy, LM, BatteryConfig(**config), None)  # pyright: ignore
    assert all(text.startswith("Sokoban: ") or "Cards" in text for text in sampler.seen)
    return found


def test_who_reads_the_prompt_and_who_does_not(monkeypatch):
    """Each answer is to one prompt alone: rules, names and the present board."""
    task: Any = make_task("sokoban_variants", 0)

    def reads(prompt: str, row: int) -> str:
        return task.scripted_action([prompt], np.random.default_rng(0))

    def frozen(prompt: str, row: int) -> str:
        listed = next(line for line in prompt.split("\n") if line.startswith("Answers: "))
        return task.scripted_action(
            [prompt.replace(listed, "Answers: " + ", ".join(STEPS))], np.random.default_rng(0)
        )

    how = {"task": "sokoban_variants", "variants": ("id", "numerical", "fake"), "episodes": 6}
    good, bad = scores(reads, monkeypatch, **how), scores(frozen, monkeypatch, **how)
    assert [(s.success, s.validity) for s in good.values()] == [(1, 1), (1, 1), (0, 1)]
    assert [(s.success, s.validity) for s in bad.values()] == [(1, 1), (0, 0), (1, 0)]
    assert good["id"].turns == bad["fake"].turns > 2 and good["fake"].turns == 30
    half = scores(lambda p, row: frozen(p, row) if row % 2 else "B", monkeypatch, **how)
    assert 0 < half["id"].success < 1 and 0 < half["id"].validity < 1 and half["id"].error > 0
    once = scores(reads, monkeypatch, **how, max_turns=1)
    assert once["numerical"].turns == 1 and once["numerical"].validity == 1
    metrics = battery_metrics(bad)
    assert metrics["battery/fake/cut"] == 0 and half["id"].cut == 0
    assert metrics["battery/fake/success"] == 1 and metrics["battery/numerical/validity"] == 0
    assert readable_battery(metrics) == (
        "; success/validity: id 1.00/1.00, numerical 0.00/0.00, fake 1.00/0.00"
    )
    assert readable_battery({"loss": 1.0}) == ""
    cut = scores(lambda p, row: reads(p, row) + "..." * (row % 2), monkeypatch, **how, max_turns=1)
    assert cut["id"].cut == 0.5 and cut["id"].validity == 0.5
    shown = readable_battery(battery_metrics(cut))
    assert shown.endswith(" (up to 50% of responses cut at max_new_tokens)")
    assert command.table(cut).splitlines()[-1].endswith(" | 1.00 | 0.500 |")
    assert command.table(bad).splitlines()[-1].startswith("| fake | 1.000 ± 0.000 | 0.000 | ")


@pytest.mark.parametrize("template", [None, "{{ messages[0]['content'] }}"])
def test_prompts_are_messages_where_the_tokenizer_has_a_template(monkeypatch, template):
    """As `sft` renders them, unless `chat` says otherwise."""
    tokenizer: Any = object.__new__(PretrainedTokenizer)
    tokenizer.chat_template = template
    lm: Any = SimpleNamespace(tokenizer=tokenizer)
    chosen = [battery.formatter_for(lm, BatteryConfig(chat=c)).chat for c in (None, False, True)]
    assert chosen == [template is not None, False, True]
    assert not battery.formatter_for(LM, BatteryConfig()).chat


def test_general_points_in_the_battery(monkeypatch):
    task: Any = make_task("general_points", 0)

    def reads(prompt: str, row: int) -> str:
        return task.scripted_action([prompt], np.random.default_rng(0))

    found = scores(reads, monkeypatch, task="general_points", episodes=4)
    assert "held_out" not in found and found.keys() >= {"fake", "five", "large", "regular"}
    assert all(each.validity == 1 for each in found.values())
    assert all(each.success == (not name.startswith("fake")) for name, each in found.items())


def test_right_episodes_without_history_are_records_of_single_states(monkeypatch):
    """A policy that was shown one state at a time is tuned on one state at a time."""
    task: Any = make_task("sokoban_variants(restate=True, variant='alphabetical')", 0)
    sampler = Scripted(lambda prompt, row: task.scripted_action([prompt], np.random.default_rng(0)))
    monkeypatch.setattr(rejection, "nucleus_sampler", lambda *_: sampler)
    turns = Turns(history=False, max_observation=1000, formatter=PromptFormatter(LM))
    job: Any = SimpleNamespace(task=task, collector=SimpleNamespace(strategy=turns.for_task(task)))
    config = rejection.RejectionConfig(task=task.name, pool=2, samples=3, batch_size=1)
    records = list(rejection.accepted(config, job))
    assert [r["prompt"] for r in records] == list(dict.fromkeys(sampler.seen))
    assert len(records) > 4 and all(r["completion"] in "ABCD" for r in records)
    strategy = "turns(history=False)"
    assert dataclasses.replace(config, strategy=strategy).rl.strategy == Turns(history=False)


@pytest.mark.parametrize("history", [False, True])
def test_mistakes_of_a_right_episode_are_no_data(monkeypatch, history):
    """Nor is an episode whose later prompts show a mistake."""
    task: Any = make_task("sokoban_variants(restate=True, variant='alphabetical')", 0)
    turn = itertools.count()

    def act(prompt: str, row: int) -> str:
        if next(turn) % 3 == 1:
            return "garbage"
        return task.scripted_action([prompt[prompt.rindex("Sokoban: ") :]], rng)

    rng, sampler = np.random.default_rng(0), Scripted(act)
    monkeypatch.setattr(rejection, "nucleus_sampler", lambda *_: sampler)
    turns = Turns(keep_context=False, history=history, max_observation=1000,
                  formatter=PromptFormatter(LM))  # fmt: skip
    job: Any = SimpleNamespace(task=task, collector=SimpleNamespace(strategy=turns.for_task(task)))
    config = rejection.RejectionConfig(task=task.name, pool=2, samples=3, batch_size=1)
    records = list(rejection.accepted(config, job))
    assert all(record["completion"] in "ABCD" for record in records)
    assert records and not any("garbage" in record["prompt"] for record in records)
    assert any("garbage" in prompt for prompt in sampler.seen) == history


def test_no_response_of_a_row_may_be_cut():
    begins, stops = (2, 5), PromptFormatter(LM).lm.stop_ids
    strategy: Any = SimpleNamespace(formatter=PromptFormatter(LM), history=True)
    row: Any = SimpleNamespace(
        tokens=np.array([1, 1, 7, stops[0], 1, 7, stops[0]]), begins=begins, finished=True,
        trained=np.array([0, 0, 1, 1, 0, 1, 1], bool), turn_rewards=(0.0, 1.0),
        reward=SimpleNamespace(info={}),
    )  # fmt: skip
    assert rejection._is_fit([row], strategy)
    row.tokens[3] = 7
    assert not rejection._is_fit([row], strategy)
    one, cut = (SimpleNamespace(**{**vars(row), "begins": (2,), "finished": f}) for f in (1, 0))
    assert rejection._is_fit([one], strategy)  # pyright: ignore[reportArgumentType]
    assert not rejection._is_fit([cut, one], strategy)  # pyright: ignore[reportArgumentType]


def test_turns_without_history_keep_no_context():
    with pytest.raises(ValueError, match="history=False forgets it: leave one of them out"):
        Turns(keep_context=True, history=False)


def test_the_divergence_is_that_of_the_whole_vocabulary():
    """Against float64 NumPy; 0 from itself, with no gradient there."""
    model, other = finetunable("all", "shallow"), finetunable("all", "shallow", 1)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (3, 12)).astype(np.int32)
    tokens[1, 8:] = -1
    rows = {"tokens": tokens, "loss_mask": (rng.random((3, 12)) < 0.6) & (tokens >= 0),
            "segment": np.minimum(tokens, 0)}  # fmt: skip

    @jax.jit
    def both(model, reference):
        inputs = jnp.maximum(tokens[:, :-1], 0)
        kl = reference_kl(model, reference, rows)
        return *kl, model.model(inputs), reference.model(inputs)

    divergence, log_probs, mine, theirs = (
        np.asarray(each, np.float64) for each in both(model, other)
    )
    log_p, log_q = (
        logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)) for logits in (mine, theirs)
    )
    mask = rows["loss_mask"][:, 1:]
    expected = np.where(mask, (np.exp(log_p) * (log_p - log_q)).sum(axis=-1), 0)
    assert expected.max() > 0.1
    np.testing.assert_allclose(divergence, expected, atol=1e-5)
    picked = np.take_along_axis(log_p, np.maximum(tokens, 0)[:, 1:, None], axis=2)[..., 0]
    np.testing.assert_allclose(log_probs, np.where(mask, picked, 0), atol=1e-5)
    same = both(model, model)[0]
    assert float(jnp.abs(same).max()) < 1e-6
