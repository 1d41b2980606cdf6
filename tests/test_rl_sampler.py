"""Sampling: what the sampler saw is what the trainer sees; rows do not depend on each other.

Programs are few on purpose: 8 rows, prompts of 17 to 32 tokens, up to 16 new ones, one number of
ids that end a text. A rollout is made once, and many tests look at it.
"""

import dataclasses
import functools
import json
from typing import Any

import jax
import numpy as np
import pytest
from rl_tiny import LORA, MEMGEN, Echo, Vowels, finetunable, language_model, sampling

import memgen
from memgen import TriggerConfig, WeaverConfig, decoding
from train.data import ByteTokenizer
from train.devices.mesh import MeshConfig, make_mesh
from train.models.finetunable import FinetunableModel
from train.rl.learning.policy import decision_scores, sampler_of, token_scores
from train.rl.rollout.formatter import PromptFormatter
from train.rl.rollout.rows import make_rows
from train.rl.rollout.sampler import Sampler, row_keys
from train.rl.rollout.strategies import STRATEGIES, OneResponse, Turns
from train.rl.types import Trajectory


def with_trigger(source: Any, **weaver: Any) -> memgen.MemGenConfig:
    weaves: WeaverConfig = dataclasses.replace(MEMGEN.weaver, **weaver)
    return dataclasses.replace(MEMGEN, weaver=weaves, trigger=TriggerConfig(source, lora=LORA))


NEVER, ALWAYS, LEARNED = memgen.NeverInvoke(), memgen.AlwaysInvoke(), memgen.LearnedInvoke()
POLICIES: dict[str, tuple[str, str, memgen.MemGenConfig, Any]] = {
    "plain": ("all", "shallow", MEMGEN, NEVER),
    "lora": ("lora", "shallow", MEMGEN, NEVER),
    "prefix rank": ("lora", "one rank", MEMGEN, NEVER),
    "threshold": ("lora", "one threshold", MEMGEN, NEVER),
    "weaver": ("weaver", "shallow", MEMGEN, ALWAYS),
    "trigger": (
        "trigger",
        "shallow",
        with_trigger("tokens", latents_see_latents=False),
        memgen.LearnedInvoke(1.0, sample=True),
    ),
    "trigger on the stream": ("trigger", "shallow", with_trigger("stream"), LEARNED),
    "trigger on forks": (
        "trigger",
        "one rank",
        with_trigger("reasoner_hidden", context="hidden"),
        LEARNED,
    ),
}
SEEDS = {"trigger on forks": 3}  # of parameters by which it skips, and invokes
SPEECH = PromptFormatter(language_model())
MESH = make_mesh(MeshConfig(), jax.devices()[:1])
ROWS, LENGTH, EVENTS = 8, 32, 9
STOP = tuple(range(0, 257, 9))
COUNTS = (1, 1, 1, 1, 1, 3)  # rollouts of each problem: 8 of 6 prompts
ASCII = 128  # ids below it are a character each, whatever they are


class Asks(Vowels):
    def problem(self, split, index):
        return dataclasses.replace(
            super().problem(split, index), prompt=f"vowels in text {index * 7919}"
        )


class Echoes(Echo):
    def problem(self, split, index):
        return dataclasses.replace(super().problem(split, index), prompt=f"say this much: {index}")


ONCE = OneResponse(formatter=SPEECH, max_new_tokens=11)
TURNS = {keep: Turns(3, 2, keep, formatter=SPEECH, max_new_tokens=3) for keep in (True, False)}
# So that turns with 8, 7 and 5 episodes in them follow each other: one bucket of rows.
EPISODES = (1, 1, 3, 0, 1, 2)


def make_sampler(name: str, max_rows: int = 64, **changes) -> tuple[Sampler, FinetunableModel]:
    method, model, config, trigger_policy = POLICIES[name]
    policy = finetunable(method, model, SEEDS.get(name, 0), config)
    how = sampling(**{"stop": STOP, "trigger_policy": trigger_policy} | changes)
    return Sampler(sampler_of(policy), how, max_rows, MESH), policy


def collect(
    name: str, strategy: Any = ONCE, task: Any = None, counts=COUNTS, **changes
) -> tuple[list[Trajectory], FinetunableModel]:
    sampler, policy = make_sampler(name, **changes)
    task = task or Asks()
    problems = [task.problem("train", index) for index in range(len(counts))]
    return strategy.collect(sampler, task, problems, list(counts), (7, 1)), policy


@functools.cache
def rollout(name: str) -> tuple[list[Trajectory], FinetunableModel]:
    return collect(name)


@functools.cache
def episodes(name: str, keep_context: bool, **changes) -> tuple[list[Trajectory], FinetunableModel]:
    return collect(name, TURNS[keep_context], Echoes(), EPISODES, valid_vocab_size=ASCII, **changes)


@jax.jit
def log_probs(
    policy: FinetunableModel, rows: Any, temperature: float, valid_vocab_size: int
) -> jax.Array:
    return token_scores(policy, rows, temperature, valid_vocab_size)


@jax.jit
def decided(policy: FinetunableModel, rows: Any) -> jax.Array:
    return decision_scores(policy, rows)


def arrays_of(rows: list[Trajectory]) -> dict[str, np.ndarray]:
    """What the trainer is given, in parts of one size."""
    parts = []
    for start in range(0, len(rows), ROWS):
        some = rows[start : start + ROWS]
        part = make_rows(some, [np.zeros(len(row.tokens)) for row in some], ROWS, EVENTS)
        assert part["tokens"].shape == (ROWS, LENGTH)
        parts.append(part)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def of_parts(
    score: Any, policy: FinetunableModel, arrays: dict[str, np.ndarray], *more
) -> np.ndarray:
    parts = range(0, len(arrays["tokens"]), ROWS)
    given = [{name: rows[at : at + ROWS] for name, rows in arrays.items()} for at in parts]
    return np.concatenate([score(policy, part, *more) for part in given])


def scored(
    rows: list[Trajectory],
    policy: FinetunableModel,
    temperature: float = 1.0,
    valid_vocab_size: int = ByteTokenizer.vocab_size,
):
    """Trainer's log-probabilities, where the policy wrote, and what it was given."""
    arrays = arrays_of(rows)
    found = of_parts(log_probs, policy, arrays, temperature, valid_vocab_size)
    assert not found[~arrays["trained"]].any()
    return found, arrays


# Adapters: the forks have them, and a tracked threshold, which is no parameter (ranks: those of
# latent memory, test_memgen_decoding); a weaver alone: the triggers have one.
LONG = [
    pytest.param(name, marks=pytest.mark.experiment) for name in ("lora", "prefix rank", "weaver")
]


@pytest.mark.parametrize("name", ["plain", "threshold", "trigger", *LONG])
def test_sampler_and_trainer_agree(name):
    """Unequal prompts, groups and texts, texts that end at their first token among them."""
    rows, policy = rollout(name)
    assert len({len(row.tokens) for row in rows}) > 2
    found, arrays = scored(rows, policy)
    np.testing.assert_allclose(found, arrays["sampler"], atol=1e-4)
    assert np.abs(arrays["sampler"][arrays["trained"]]).min() > 1e-3


def test_one_row_and_an_end_at_the_first_token():
    rows, policy = collect(
        "plain", counts=(1,), valid_vocab_size=len(STOP), stop=tuple(range(len(STOP)))
    )
    assert [row.num_generated for row in rows] == [1]
    found, arrays = scored(rows, policy, valid_vocab_size=len(STOP))
    np.testing.assert_allclose(found, arrays["sampler"], atol=1e-4)


def test_temperature_and_choices_are_scored_as_they_were_sampled():
    rows, policy = collect("plain", temperature=0.5, valid_vocab_size=100)
    found, arrays = scored(rows, policy, 0.5, 100)
    assert arrays["tokens"][arrays["trained"]].max() < 100
    np.testing.assert_allclose(found, arrays["sampler"], atol=1e-4)
    other, _ = scored(rows, policy, 1.0, 100)
    assert np.abs(other - found).max() > 0.1


def test_decisions_are_scored_where_they_were_made():
    """Their log-probabilities are those of the trigger that made them: redone by hand."""
    rows, policy = rollout("trigger")
    arrays = arrays_of(rows)
    found = of_parts(decided, policy, arrays)
    asked = arrays["decisions"] >= 0
    assert asked.any() and not found[~asked].any()
    assert {0, 1} <= set(arrays["decisions"][asked])

    @jax.jit
    def by_hand(policy, tokens):
        decoder, trigger = policy.memgen.triggering(), policy.memgen.checked_trigger()
        hidden = decoder.hidden_states(decoder.embed_tokens(tokens))  # it reads tokens alone
        return jax.nn.log_softmax(trigger(hidden))

    after = np.asarray(by_hand(policy, arrays["tokens"]))
    for row, place in zip(*np.nonzero(asked), strict=True):
        decision = arrays["decisions"][row, place]
        np.testing.assert_allclose(found[row, place], after[row, place - 1, decision], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "alone"),
    [("plain", 3), pytest.param("weaver", 5, marks=pytest.mark.experiment), ("trigger", 5)],
)
def test_a_row_depends_on_no_other(name, alone):
    """Alone, in other company, or some at a time: the same text, decisions and scores."""
    together, _ = rollout(name)
    parted, _ = collect(name, counts=(*COUNTS[:5], 5), max_rows=5)
    mine, _ = collect(name, counts=(0,) * 5 + (alone,))
    pairs = [*zip(together, parted, strict=False), *zip(together[5:], mine, strict=False)]
    assert len(pairs) == 8 + 3
    for row, other in pairs:
        np.testing.assert_array_equal(row.tokens, other.tokens)
        np.testing.assert_array_equal(row.decisions, other.decisions)
        np.testing.assert_allclose(row.log_probs, other.log_probs, atol=1e-5)


@pytest.mark.parametrize("word", STRATEGIES)
def test_every_strategy_makes_the_rollouts_that_were_planned(word):
    """The same ones again from the same seed, and only generated tokens are trained."""
    known: dict[str, Any] = {"one_response": (ONCE, EPISODES), "turns": (TURNS[True], EPISODES)}
    default = dataclasses.replace(STRATEGIES[word](), formatter=SPEECH, max_new_tokens=11)
    strategy, counts = known.get(word, (default, EPISODES))
    task = Echoes() if strategy.episodic else Asks()
    changes = {"valid_vocab_size": ASCII} if strategy.episodic else {}
    rows, _ = collect("plain", dataclasses.replace(strategy), task, counts, **changes)
    again, _ = collect("plain", strategy, task, counts, **changes)
    assert len(again) == len(rows)
    for group, count in enumerate(counts):
        mine = [row for row in rows if row.group == group and row.source != "probe"]
        assert len({row.episode for row in mine}) == count
        assert {row.problem for row in mine} <= {task.problem("train", group)}
    for row, other in zip(rows, again, strict=True):
        np.testing.assert_array_equal(row.tokens, other.tokens)
        assert row.reward == other.reward
        assert (row.log_probs[~row.trained] == 0).all() and (row.log_probs[row.trained] < 0).all()
        assert len(row.begins) == len(row.texts) <= strategy.responses_per_row
        assert row.trained[list(row.begins)].all()
    strategy.restore(json.loads(json.dumps(strategy.state)))


@pytest.mark.parametrize(
    ("name", "keep_context", "changes"),
    [
        pytest.param("trigger on the stream", True, {}, marks=pytest.mark.experiment),
        pytest.param("trigger on forks", True, {}, marks=pytest.mark.experiment),
        # Near temperature 0 the likelier one is drawn, by the program that draws.
        pytest.param(
            *("trigger", False, {"trigger_policy": memgen.LearnedInvoke(1e-4, sample=True)}),
        ),
    ],
    ids=["stream", "hidden states of forks", "tokens"],
)
def test_decisions_of_every_kind_of_trigger_are_replayed(name, keep_context, changes):
    """A decision that was the likelier one is the likelier one when it is scored."""
    rows, policy = episodes(name, keep_context, **changes)
    arrays = arrays_of(rows)
    asked = arrays["decisions"] >= 0
    assert asked.sum() > 20 and {0, 1} <= set(arrays["decisions"][asked])
    assert of_parts(decided, policy, arrays)[asked].min() > np.log(0.5) - 1e-4


def test_rollouts_of_a_problem_differ_and_come_again():
    rows, _ = rollout("plain")
    again, _ = collect("plain")
    texts = [tuple(row.tokens) for row in rows]
    assert texts == [tuple(row.tokens) for row in again]
    assert len(set(texts)) == len(texts)


def test_a_problem_that_comes_twice_is_answered_anew():
    class Same(Asks):
        def problem(self, split, index):
            return super().problem(split, 0)

    rows, _ = collect("plain", task=Same())
    texts = [tuple(row.tokens) for row in rows]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("name", ["plain", "threshold", "trigger", LONG[-1]])
def test_a_shared_prompt_is_read_once_and_changes_nothing(name):
    """Rows taken from one reading equal rows that read the prompt themselves."""
    sampler, _ = make_sampler(name)
    keys = row_keys((1,), ["a"] * ROWS, range(ROWS))
    prompt = SPEECH.prompt(["how many letters?"])
    shared = sampler.open([prompt], [0] * ROWS, keys, 8).respond(8)
    own = sampler.open([prompt] * ROWS, range(ROWS), keys, 8).respond(8)
    for one, other in zip(shared, own, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "keep_context", "changes"),
    [
        ("plain", True, {}),
        ("plain", False, {}),
        pytest.param("trigger on the stream", True, {}, marks=pytest.mark.experiment),
        pytest.param(
            *("weaver", True, {"trigger_policy": memgen.RandomInvoke(0.5)}),
            marks=pytest.mark.experiment,
        ),
        pytest.param("weaver", False, {}, marks=pytest.mark.experiment),
        pytest.param("trigger on forks", True, {}, marks=pytest.mark.experiment),
    ],
    ids=str,
)
def test_episodes_of_several_turns(name, keep_context, changes):
    """Observations are attended to and not trained; every turn is scored as it was sampled."""
    rows, policy = episodes(name, keep_context, **changes)
    turns = {index: 1 + index % 3 for index in range(len(EPISODES))}
    played = [turns[index] for index, count in enumerate(EPISODES) for _ in range(count)]
    assert len(rows) == (len(played) if keep_context else sum(played))
    for row in rows:
        assert len(row.turn_rewards) == turns[row.group]
        assert len(row.begins) == (turns[row.group] if keep_context else 1)
    found, arrays = scored(rows, policy, valid_vocab_size=ASCII)
    np.testing.assert_allclose(found, arrays["sampler"], atol=1e-4)
    last = next(row for row in rows if row.group == 2)
    said = ByteTokenizer().decode([*last.tokens[~last.trained]])
    assert ("<" in said) == keep_context
    if name != "plain" and keep_context:
        assert (last.decisions[list(last.begins)] >= 0).all()


def test_turn_by_turn_equals_one_row_without_memory():
    """Without memory both ways of playing are one policy."""
    together, policy = episodes("plain", True)
    whole, _ = scored(together, policy, valid_vocab_size=ASCII)
    turns, places = [], []
    for index, row in enumerate(together):
        ends = [*row.begins[1:], len(row.tokens)]
        for begin, end in zip(row.begins, ends, strict=True):
            turns.append(dataclasses.replace(
                row, tokens=row.tokens[:end], trained=row.trained[:end] & (np.arange(end) >= begin),
                log_probs=row.log_probs[:end], decisions=row.decisions[:end],
            ))  # fmt: skip
            places.append(index)
    found, parts = scored(turns, policy, valid_vocab_size=ASCII)
    for turn, (index, trained) in enumerate(zip(places, parts["trained"], strict=False)):
        assert trained.any()
        np.testing.assert_allclose(found[turn][trained], whole[index][trained], atol=1e-4)


def test_no_call_copies_blocks_out_of_their_stack():
    """`test_for_decoding` reads what programs of either form hold."""
    reasoner: Any = make_sampler("plain")[0].policy.reasoner
    assert reasoner.model.blocks is None and reasoner.model.unstacked


def test_programs_are_counted():
    """One for each bucket of rows and lengths; other numbers in the same buckets find it."""
    sampler, _ = make_sampler("plain")
    program: Any = decoding._respond
    run = lambda rows, prompt: sampler.open(  # noqa: E731
        [list(range(1, prompt))], [0] * rows, row_keys((0,), ["a"] * rows, range(rows)), 8
    ).respond(8)
    run(5, 18)
    run(5, 18)
    before = program._cache_size()
    run(8, 20)
    run(7, 32)
    assert program._cache_size() == before
    run(7, 100)  # longer than all others of this file
    assert program._cache_size() == before + 1
