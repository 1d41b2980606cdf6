"""Sampling: what the sampler saw is what the trainer sees; rows do not depend on each other."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rl_tiny import (
    BOUNDARY,
    LORA,
    MEMGEN,
    MODELS,
    Echo,
    Vowels,
    filled,
    sampling,
    tuned,
    writer,
)

import memgen
from memgen import TriggerConfig, decoding
from thoughtbubbles import Thoughtbubbles
from train.data import ByteTokenizer
from train.mesh import MeshConfig, make_mesh
from train.rl.policy import decision_scores, sampler_of, token_scores
from train.rl.rollouts import make_rows
from train.rl.sampler import Sampler, row_keys
from train.rl.strategies import OneResponse, Speech, Turns
from train.tuning import Tuned

POLICIES = {
    "plain": ("all", "plain", memgen.NeverInvoke()),
    "lora": ("lora", "plain", memgen.NeverInvoke()),
    "prefix rank": ("all", "rank", memgen.NeverInvoke()),
    "threshold": ("lora", "threshold", memgen.NeverInvoke()),
    "weaver": ("weaver", "plain", memgen.AlwaysInvoke()),
    "weaver on forks": ("weaver", "rank", memgen.RandomInvoke(0.5)),
    "trigger": ("trigger", "plain", memgen.LearnedInvoke(1.0, sample=True)),
}
SPEECH = Speech(writer())
MESH = make_mesh(MeshConfig(), jax.devices()[:1])


def make_sampler(name: str, max_rows: int = 64, **changes) -> tuple[Sampler, Tuned]:
    method, model, memory = POLICIES[name]
    policy = tuned(method, model)
    how = sampling(memory=memory, **changes)
    return Sampler(sampler_of(policy), how, max_rows, MESH), policy


def collect(name: str, strategy: Any = None, task: Any = None, counts=(3, 1, 4), **changes):
    sampler, policy = make_sampler(name, **changes)
    task = task or Vowels()
    strategy = strategy or OneResponse(SPEECH, 12)
    problems = [task.problem("train", index) for index in range(len(counts))]
    return strategy.collect(sampler, task, problems, list(counts), (7, 1)), policy


def scored(rows, policy, events: int = 12, temperature: float = 1.0):
    """Trainer's log-probabilities minus the sampler's, where the policy wrote."""
    arrays = make_rows(rows, [np.zeros(len(row.tokens)) for row in rows], 1, events)
    placed = {key: jnp.asarray(value) for key, value in arrays.items()}
    score = jax.jit(
        lambda policy, rows: token_scores(policy, rows, temperature, ByteTokenizer.vocab_size)
    )
    found = np.asarray(score(policy, placed))
    assert not found[~arrays["trained"]].any()
    return found, arrays


@pytest.mark.parametrize("name", POLICIES)
def test_sampler_and_trainer_agree(name):
    """Unequal prompts, groups and texts, texts that end at their first token among them."""
    rows, policy = collect(name, stop=tuple(range(0, 257, 9)))
    assert len({len(row.tokens) for row in rows}) > 2
    found, arrays = scored(rows, policy)
    np.testing.assert_allclose(found, arrays["sampler"], atol=1e-4)
    assert np.abs(arrays["sampler"][arrays["trained"]]).min() > 1e-3


def test_one_row_and_an_end_at_the_first_token():
    rows, policy = collect("plain", counts=(1,), stop=tuple(range(257)))
    assert [row.written for row in rows] == [1]
    found, arrays = scored(rows, policy)
    np.testing.assert_allclose(found, arrays["sampler"], atol=1e-4)


def test_temperature_and_choices_are_scored_as_they_were_sampled():
    rows, policy = collect("plain", temperature=0.5, choices=100)
    arrays = make_rows(rows, [np.zeros(len(row.tokens)) for row in rows])
    assert arrays["tokens"][arrays["trained"]].max() < 100
    placed = {key: jnp.asarray(value) for key, value in arrays.items()}
    found = np.asarray(token_scores(policy, placed, 0.5, 100))
    np.testing.assert_allclose(found, arrays["sampler"], atol=1e-4)
    other = np.asarray(token_scores(policy, placed, 1.0, 100))
    assert np.abs(other - found).max() > 0.1


def test_decisions_are_scored_where_they_were_made():
    """Their log-probabilities are those of the trigger that made them: redone by hand."""
    rows, policy = collect("trigger")
    arrays = make_rows(rows, [np.zeros(len(row.tokens)) for row in rows], 1, 3)
    placed = {key: jnp.asarray(value) for key, value in arrays.items()}
    found = np.asarray(decision_scores(policy, placed))
    asked = arrays["decisions"] >= 0
    assert asked.any() and not found[~asked].any()
    assert {0, 1} <= set(arrays["decisions"][asked])
    assert policy.memgen is not None
    decoder, trigger = policy.memgen.triggering(), policy.memgen.checked_trigger()
    hidden = decoder.read(decoder.embed_tokens(placed["tokens"]))  # it reads tokens alone
    for row, place in zip(*np.nonzero(asked), strict=True):
        by_hand = jax.nn.log_softmax(trigger(hidden[row, place - 1]))
        decision = arrays["decisions"][row, place]
        np.testing.assert_allclose(found[row, place], by_hand[decision], atol=1e-4)


@pytest.mark.parametrize("name", ["plain", "weaver", "trigger"])
def test_a_row_depends_on_no_other(name):
    """Alone, in other company, or some at a time: the same text, decisions and scores."""
    together, _ = collect(name)
    parted, _ = collect(name, max_rows=3)
    alone, _ = collect(name, counts=(0, 0, 4))
    for row, other in [*zip(together, parted, strict=True), *zip(together[4:], alone, strict=True)]:
        np.testing.assert_array_equal(row.tokens, other.tokens)
        np.testing.assert_array_equal(row.decisions, other.decisions)
        np.testing.assert_allclose(row.log_probs, other.log_probs, atol=1e-5)


@pytest.mark.parametrize(
    ("source", "model", "weaver", "carry"),
    [
        ("stream", "plain", {}, True),
        ("reasoner_hidden", "rank", {"context": "hidden"}, True),
        ("tokens", "plain", {"latents_see_latents": False}, False),
    ],
)
def test_decisions_of_every_kind_of_trigger_are_replayed(source, model, weaver, carry):
    """A decision that was the likelier one is the likelier one when it is scored."""
    config = dataclasses.replace(
        MEMGEN,
        weaver=dataclasses.replace(MEMGEN.weaver, **weaver),
        trigger=TriggerConfig(source, lora=LORA),
    )
    decoder = Thoughtbubbles(MODELS[model], rngs=nnx.Rngs(0))
    policy = filled(
        Tuned(decoder, "trigger", lora=LORA, memgen=config, boundary=BOUNDARY, rngs=nnx.Rngs(1))
    )
    how = sampling(memory=memgen.LearnedInvoke(), stop=tuple(range(0, 257, 40)))
    sampler = Sampler(sampler_of(policy), how, 64, MESH)
    problems = [Echo().problem("train", index) for index in range(6)]
    rows = Turns(SPEECH, 8, 3, 8, carry).collect(sampler, Echo(), problems, [2] * 6, (7, 1))
    arrays = make_rows(rows, [np.zeros(len(row.tokens)) for row in rows], 1, 9)
    placed = {key: jnp.asarray(value) for key, value in arrays.items()}
    score = jax.jit(lambda policy, rows: decision_scores(policy, rows))
    asked = arrays["decisions"] >= 0
    assert asked.sum() > 20 and {0, 1} <= set(arrays["decisions"][asked])
    assert np.asarray(score(policy, placed))[asked].min() > np.log(0.5) - 1e-4


def test_rollouts_of_a_problem_differ_and_come_again():
    rows, _ = collect("plain")
    again, _ = collect("plain")
    texts = [tuple(row.tokens) for row in rows]
    assert texts == [tuple(row.tokens) for row in again]
    assert len(set(texts)) == len(texts)


def test_a_problem_that_comes_twice_is_answered_anew():
    class Same(Vowels):
        def problem(self, split, index):
            return super().problem(split, 0)

    rows, _ = collect("plain", task=Same())
    texts = [tuple(row.tokens) for row in rows]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("name", ["plain", "prefix rank", "weaver", "trigger"])
def test_a_shared_prompt_is_read_once_and_changes_nothing(name):
    """Rows taken from one reading equal rows that read the prompt themselves."""
    sampler, _ = make_sampler(name)
    keys = row_keys((1,), ["a"] * 4, range(4))
    prompt = SPEECH.prompt(["how many letters?"])
    shared = sampler.open([prompt], [0] * 4, keys, 8).respond(8)
    own = sampler.open([prompt] * 4, range(4), keys, 8).respond(8)
    for one, other in zip(shared, own, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("name", ["plain", "weaver"])
def test_episodes_of_several_turns(name, carry):
    """Observations are attended to and not trained; every turn is scored as it was sampled."""
    rows, policy = collect(name, Turns(SPEECH, 5, 3, 8, carry), Echo(), (2, 2, 2))
    turns = {index: 1 + index % 3 for index in range(3)}
    assert len(rows) == (6 if carry else 2 * sum(turns.values()))
    for row in rows:
        assert len(row.turn_rewards) == turns[row.group]
        assert len(row.begins) == (turns[row.group] if carry else 1)
    found, arrays = scored(rows, policy, 12)
    np.testing.assert_allclose(found, arrays["sampler"], atol=1e-4)
    last = next(row for row in rows if row.group == 2)
    said = ByteTokenizer().decode([*last.tokens[~last.trained]])
    assert ("<" in said) == carry
    if POLICIES[name][0] == "weaver" and carry:
        assert (last.decisions[list(last.begins)] >= 0).all()


def test_turn_by_turn_equals_one_row_without_memory():
    """Without memory and without cut observations both ways of playing are one policy."""
    together, policy = collect("plain", Turns(SPEECH, 5, 3, 8, True), Echo(), (2, 2, 2))
    arrays = make_rows(together, [np.zeros(len(row.tokens)) for row in together])
    placed = {key: jnp.asarray(value) for key, value in arrays.items()}
    whole = np.asarray(token_scores(policy, placed, 1.0, ByteTokenizer.vocab_size))
    for index, row in enumerate(together):
        ends = [*row.begins[1:], len(row.tokens)]
        for begin, end in zip(row.begins, ends, strict=True):
            turn = dataclasses.replace(
                row, tokens=row.tokens[:end], trained=row.trained[:end] & (np.arange(end) >= begin),
                log_probs=row.log_probs[:end], decisions=row.decisions[:end],
            )  # fmt: skip
            found, parts = scored([turn], policy)
            np.testing.assert_allclose(
                found[0][parts["trained"][0]], whole[index, :end][turn.trained], atol=1e-4
            )


def test_programs_are_counted():
    """One for each bucket of rows and lengths; other numbers in the same buckets find it."""
    sampler, _ = make_sampler("plain", stop=())
    program: Any = decoding._respond
    run = lambda rows, prompt: sampler.open(  # noqa: E731
        [list(range(1, prompt))], [0] * rows, row_keys((0,), ["a"] * rows, range(rows)), 8
    ).respond(8)
    run(5, 9)
    run(5, 9)
    before = program._cache_size()
    run(8, 12)
    run(7, 16)
    assert program._cache_size() == before
    run(9, 16)
    assert program._cache_size() == before + 1
