"""Oracle tests D: generation, against a loop that reads everything again, row by row."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import memgen_reference as oracle
import numpy as np
import pytest
from memgen_tiny import (
    BOUNDARY,
    CONFIG,
    EVENTS,
    LORA,
    NEW,
    NOBODY,
    PROMPTS,
    VOCAB,
    answer,
    forced_log_probs,
    in_numpy,
    memgen_of,
    pure,
    read,
    replaced,
    rollout,
    trigger_config,
    weaver_config,
    whole_rows,
)

from memgen import (
    AlwaysInvoke,
    LearnedInvoke,
    MemGenConfig,
    NeverInvoke,
    RandomInvoke,
    TriggerConfig,
    begin,
    boundary_table,
    generate,
    is_boundary,
    make_request,
    observe,
    plan_from_decisions,
    respond,
)
from memgen import decoding as loop_module
from memgen.events import WeaverBatchSize
from memgen.request import pad_prompts, row_keys

HIDDEN = dataclasses.replace(
    weaver_config(context="hidden"), trigger=TriggerConfig("stream", lora=LORA)
)
AT_ONCE = dataclasses.replace(
    weaver_config(latents_see_latents=False), trigger=TriggerConfig("reasoner_hidden", lora=LORA)
)
RAW = weaver_config(match_scale=False, prompt_latents=0)
LEARNED = LearnedInvoke()
# Of two blocks where they matter: in forks, and in weaving at once.
CASES: dict[str, tuple[str, MemGenConfig, Any]] = {
    "one block, always": ("shallow", CONFIG, AlwaysInvoke()),
    "one block, hidden states, trigger on the stream": ("shallow", HIDDEN, LEARNED),
    "plain, one pass, trigger on hidden states": ("plain", AT_ONCE, LEARNED),
    "forks by rank, raw, none of a prompt, on tokens": ("one fork by rank", RAW, LEARNED),
    "forks by threshold": ("one fork by threshold", CONFIG, AlwaysInvoke()),
}
CONVERSED = ("one block, always",)  # teacher forcing: test_memgen_io
# Which policy forks is nothing to a response; latents of one pass: `test_rl_sampler.py`.
# Both run by `python -m pytest -m experiment tests/test_memgen_decoding.py`.
OTHERS = ("forks by threshold", "plain, one pass, trigger on hidden states")
NAMES = [
    pytest.param(name, marks=pytest.mark.experiment) if name in OTHERS else name for name in CASES
]


@functools.cache
def oracle_rows(name: str) -> tuple[Any, Any, list[oracle.Generated]]:
    kind, config, policy = CASES[name]
    made, response = rollout(kind, config, policy)
    response = in_numpy(response)
    sizes, params = made.reasoner.model.config, pure(made.reasoner.model)
    weaver, trigger = pure(made.weaver), pure(made.trigger)
    decoder = oracle.thoughtbubbles(params, sizes)
    scale = LORA.alpha / LORA.rank
    weaves = oracle.thoughtbubbles(oracle.merged(params, weaver["adapter"], scale), sizes)
    source = config.trigger.source if config.trigger else None
    adapter = trigger.get("adapter") or {}
    triggers = oracle.thoughtbubbles(oracle.merged(params, adapter, scale), sizes)

    def decide(step: int, tokens: list[int], inputs_embeds: list[np.ndarray]) -> bool:
        if policy != LEARNED:
            return True
        seen = decoder.embed(tokens) if source == "tokens" else np.stack(inputs_embeds)
        skip, invoke = oracle.trigger_logits(trigger, triggers, seen)
        assert abs(invoke - skip) > 1e-3
        return invoke > skip

    rows = [
        oracle.generate(
            decoder,
            weaves,
            weaver,
            prompt,
            NEW,
            lambda token: bool(BOUNDARY[token]),
            EVENTS,
            decide,
            context=config.weaver.context,
            latents_see_latents=config.weaver.latents_see_latents,
        )
        for prompt in PROMPTS
    ]
    return made, response, rows


def test_a_top_p_of_one_is_off():
    """Summed in float32 it would leave out improbable tokens."""
    made = memgen_of()
    assert make_request(made, 4, temperature=1.0, top_p=1.0).top_p is None
    assert make_request(made, 4, temperature=1.0, top_p=0.5).top_p == 0.5
    assert make_request(made, 4, temperature=1e-38).temperature is None, "logits would be infinite"


@pytest.mark.parametrize("name", NAMES)
def test_d28_cached_is_recomputed(name: str):
    made, response, rows = oracle_rows(name)
    for index, row in enumerate(rows):
        assert row.margin > 1e-4, "choose another seed: two tokens are equally probable"
        assert response.texts[index] == row.tokens
        assert response.decisions[index, :NEW].tolist() == row.decisions
        np.testing.assert_allclose(response.log_probs[index, :NEW], row.log_probs, atol=1e-4)
        latents = np.stack(row.inputs_embeds)[row.is_latent]
        widths = [made.config.weaver.prompt_latents, *[made.config.weaver.inference_latents] * 9]
        used = np.asarray(response.points[index]) >= 0
        ours = [
            memory[:width]
            for memory, width, on in zip(response.latents[index], widths, used, strict=False)
            if on
        ]
        ours = np.concatenate([np.zeros((0, 32)), *ours])
        np.testing.assert_allclose(ours, latents, atol=1e-4)
    assert 1 in np.concatenate([row.decisions for row in rows])


def test_the_learned_triggers_above_say_both():
    cases = {name: case for name, case in CASES.items() if name not in OTHERS}
    names = [name for name, (_, _, policy) in cases.items() if policy == LEARNED]
    decisions = [row.decisions for name in names for row in oracle_rows(name)[2]]
    assert {0, 1} <= set(np.concatenate(decisions).tolist())


@pytest.mark.parametrize("name", NAMES)
def test_d31_budget_and_record(name: str):
    made, response, rows = oracle_rows(name)
    config, decisions = made.config, np.asarray(response.decisions)
    assert set(np.unique(decisions)) <= {-1, 0, 1}
    assert (decisions[:, 0] >= 0).all() and (decisions[:, NEW:] == -1).all()
    later = (decisions[:, 1:] == 1).sum(axis=1)
    assert later.max() <= config.max_inference_events
    if CASES[name][2] != LEARNED:
        assert later.max() == config.max_inference_events, "the budget is met somewhere"
    for row, (prompt, new) in enumerate(zip(PROMPTS, response.texts, strict=True)):
        used = 0
        for step in range(1, NEW):
            asked = BOUNDARY[new[step - 1]] and used < EVENTS
            assert (decisions[row, step] >= 0) == bool(asked)
            used += decisions[row, step] == 1
        points = [p for p in response.points[row].tolist() if p >= 0]
        assert points == np.flatnonzero(decisions[row] == 1).tolist()
        count = config.weaver.prompt_latents * int(decisions[row, 0] == 1) + 2 * int(later[row])
        assert len(rows[row].inputs_embeds) == len(prompt) + NEW + count


@pytest.mark.parametrize("name", [name for name in NAMES if name not in CONVERSED])
def test_d33_teacher_forcing_gives_the_same_log_probs(name: str):
    kind, config, policy = CASES[name]
    made, response = rollout(kind, config, policy)
    response = in_numpy(response)
    tokens, prompt = whole_rows(PROMPTS, response)
    plan = plan_from_decisions(response.decisions, prompt, config)
    assert ((np.asarray(plan.point) >= 0).sum(axis=1) >= 2).any()
    forced = np.asarray(forced_log_probs(made, tokens, plan))
    for row, start in enumerate(prompt.tolist()):
        np.testing.assert_allclose(
            forced[row, start : start + NEW], response.log_probs[row, :NEW], atol=1e-4
        )


@pytest.mark.experiment  # test_memgen_rows shows more of it, and d27 below of what is sampled
@pytest.mark.parametrize("kind", ["shallow", "foreign"])
def test_d26_batched_is_one_by_one(kind: str):
    made, together = rollout(kind, CONFIG, AlwaysInvoke())
    together = in_numpy(together)
    assert len({tuple(row) for row in together.decisions.tolist()}) > 1
    for row, prompt in enumerate(PROMPTS[:2]):
        alone = in_numpy(answer(made, [prompt]))
        assert alone.texts[0] == together.texts[row]
        np.testing.assert_allclose(alone.log_probs[0], together.log_probs[row], atol=1e-4)
        assert (alone.decisions[0] == together.decisions[row]).all()
        assert (alone.points[0] == together.points[row]).all()


SAMPLED: dict[str, Any] = {"policy": RandomInvoke(0.5), "temperature": 1.0}
SHORT = [PROMPTS[0], PROMPTS[1], PROMPTS[1]]


def test_d27_sampled_batched_is_sampled_alone_and_d34_repeats():
    """In other company: one program; of one row it is that of test_memgen_rows, which is greedy."""
    made = memgen_of("shallow")
    together = in_numpy(answer(made, SHORT, **SAMPLED, seed=3))
    for row, prompt in enumerate(SHORT[:2]):
        alone = in_numpy(answer(made, [prompt, [8, 8], [5]], **SAMPLED, seed=3))
        assert alone.texts[0] == together.texts[row]
        assert (alone.decisions[0] == together.decisions[row]).all()
    assert any({0, 1} <= set(row) for row in together.decisions.tolist()), "steps have own keys"
    assert answer(made, SHORT, **SAMPLED, seed=3).texts == together.texts
    assert together.texts[1] != together.texts[2], "equal prompts of a batch have keys of their own"
    assert answer(made, SHORT, **SAMPLED, seed=4).texts != together.texts


def test_d34_rules_do_not_sample_and_random_has_its_frequency():
    keys = jax.random.split(jax.random.key(0), 20_000)
    logits = jnp.zeros((20_000, 2)).at[:, 1].set(1.0)
    assert AlwaysInvoke()(logits, keys).all() and not NeverInvoke()(logits, keys).any()
    assert LearnedInvoke()(logits, keys).all() and not LearnedInvoke()(-logits, keys).any()
    for policy, expected in (
        (RandomInvoke(0.2), 0.2),
        (RandomInvoke(0.0), 0.0),
        (RandomInvoke(1.0), 1.0),
        (LearnedInvoke(sample=True), 1 / (1 + np.exp(-1))),
        (LearnedInvoke(0.5, sample=True), 1 / (1 + np.exp(-2))),
    ):
        sigma = np.sqrt(expected * (1 - expected) / 20_000)
        assert abs(float(policy(logits, keys).mean()) - expected) <= 4 * sigma


@pytest.fixture(scope="module")
def session_of_prompts():
    """A function to a new session of the shared prompts and what goes with it."""
    tokens, length = pad_prompts(PROMPTS, VOCAB)

    def new(made, room: int = 16, responses: int = 1):
        keys = row_keys(0, PROMPTS)
        return begin(made, tokens, length, keys, tokens.shape[1] + room, responses)

    return new


def test_d29_a_chunk_of_latents_is_what_reading_anew_gives(session_of_prompts):
    made = memgen_of()
    session = session_of_prompts(made)
    latents = np.random.default_rng(0).normal(size=(3, 3, 32)).astype(np.float32)
    count = np.array([3, 0, 2])
    after = jax.jit(lambda made, s, x, n: s.append(made, x, n))(made, session, latents, count)
    assert (after.reasoner.hidden[1] == session.reasoner.hidden[1]).all()
    table = np.asarray(made.reasoner.model.embed[...])
    whole, last = np.zeros((3, 40, 32), np.float32), np.asarray(session.count) + count - 1
    for row, prompt in enumerate(PROMPTS):
        whole[row, : last[row] + 1] = np.concatenate([table[prompt], latents[row, : count[row]]])
    hidden = np.asarray(read(made.reasoner, whole))
    np.testing.assert_allclose(after.reasoner.hidden, hidden[np.arange(3), last], atol=1e-5)


@pytest.mark.experiment  # the oracle of d28 steps by a loop of its own
def test_d30_while_is_scan():
    """The same steps by `lax.scan`, which never leaves early."""
    made = memgen_of("shallow")
    response = answer(made, SHORT, **SAMPLED)
    request = make_request(made, NEW, **SAMPLED, stop=NOBODY)
    tokens, length = pad_prompts(SHORT, VOCAB)
    session = begin(made, tokens, length, row_keys(0, SHORT), tokens.shape[1] + 16)

    @jax.jit
    def by_scan(made, session, request):
        decoders, limit = loop_module.Decoders.prepare(made), jnp.int32(NEW)
        start = loop_module._start(decoders, limit, request, session, 16)
        size = WeaverBatchSize()
        step = lambda loop, _: (loop_module._step(decoders, request, limit, loop, size), None)  # noqa: E731
        return jax.lax.scan(step, start, length=NEW)[0].response

    scanned = by_scan(made, session, request)
    assert scanned.texts == response.texts
    assert (scanned.decisions == response.decisions).all()
    assert (scanned.points == response.points).all()
    assert 1 in np.asarray(response.decisions)[:, 1:]
    np.testing.assert_allclose(scanned.log_probs, response.log_probs, atol=1e-5)


@pytest.mark.experiment  # the oracle of d28 isn't compiled either
def test_d30_compiled_is_not_compiled():
    """Operation by operation, Python's own loops: the same ids and events.

    By a decoder that reads everything anew: all that it reads is of one shape.
    """
    made, prompt = memgen_of("foreign"), [[9, 4]]
    compiled = answer(made, prompt, 2)
    with jax.disable_jit():
        plain = answer(made, prompt, 2)
    assert compiled.decisions[0, :2].tolist() == [1, 1]
    assert plain.texts == compiled.texts
    for name in ("decisions", "points", "count"):
        assert (getattr(plain, name) == getattr(compiled, name)).all()
    np.testing.assert_allclose(plain.log_probs, compiled.log_probs, atol=1e-5)
    np.testing.assert_allclose(plain.latents, compiled.latents, atol=1e-5)


def test_d32_a_row_ends_at_its_stop_id():
    made, free = rollout("shallow", CONFIG, AlwaysInvoke())
    stop = next(
        new[place] for new in free.texts for place in range(1, NEW - 1) if new[place] != new[0]
    )
    stopped = in_numpy(answer(made, stop=[stop]))
    lengths = [new.index(stop) + 1 if stop in new else NEW for new in free.texts]
    assert min(lengths) < max(lengths)
    assert stopped.count.tolist() == lengths
    for row, length in enumerate(lengths):
        assert stopped.texts[row] == free.texts[row][:length]
        assert (stopped.tokens[row, length:] == 0).all()
        assert (stopped.decisions[row, length:] == -1).all()
        assert (stopped.log_probs[row, length:] == 0).all()
        np.testing.assert_allclose(
            stopped.log_probs[row, :length], np.asarray(free.log_probs)[row, :length], atol=1e-5
        )
        assert (stopped.points[row] < length).all()
    # Rows that rest cost no room and change nothing: less is asked for by number alone.
    fewer = answer(made, new=4)
    assert fewer.texts == [new[:4] for new in free.texts]


def test_a_response_goes_on_from_tokens_that_are_given():
    """The tokens, samples, decisions and latents of a response that the model began itself."""
    made, cuts = memgen_of("shallow"), (3, 0, 7)
    whole = in_numpy(answer(made, SHORT, **SAMPLED, seed=3))
    prefills = [text[:cut] for text, cut in zip(whole.texts, cuts, strict=True)]
    stop = whole.texts[2][0]  # which ends no row as part of a prefill
    how: dict[str, Any] = {**SAMPLED, "seed": 3, "prefills": prefills}
    found, ended = (in_numpy(answer(made, SHORT, 10, stop=[of], **how)) for of in (VOCAB, stop))
    assert found.count.tolist() == [cut + 10 for cut in cuts]
    for row, cut in enumerate(cuts):
        count = min(NEW, cut + 10)
        assert found.texts[row][:count] == whole.texts[row][:count]
        for name in ("log_probs", "decisions"):
            of, expected = (getattr(each, name)[row, :count] for each in (found, whole))
            np.testing.assert_allclose(of, expected, atol=1e-4)
        here = (whole.points[row] >= 0) & (whole.points[row] < count)
        assert (found.points[row][here] == whole.points[row][here]).all()
        np.testing.assert_allclose(found.latents[row][here], whole.latents[row][here], atol=1e-4)
        later = [at for at, token in enumerate(found.texts[row]) if at >= cut and token == stop]
        assert ended.count[row] == (later[0] + 1 if later else cut + 10)
    assert stop in prefills[2]
    assert any((whole.decisions[row, 1:cut] == 1).any() for row, cut in enumerate(cuts))


def test_a_prefill_ends_with_its_array():
    request = dataclasses.replace(make_request(memgen_of(), 4), prefill=jnp.full((2, 16), 7))
    given = loop_module._given(request, jnp.array([15, 16]))
    assert given is not None and given.tolist() == [7, -1]


def test_d35_events_are_not_part_of_the_program():
    made = memgen_of("shallow")
    sizes = lambda: (loop_module._begin._cache_size(), loop_module._respond._cache_size())  # noqa: E731
    patterns = set()
    answer(made, SHORT, **SAMPLED)  # a program of before may be forgotten
    before = sizes()
    for seed in range(4):
        how: dict[str, Any] = {**SAMPLED, "policy": RandomInvoke(0.2 * seed), "seed": seed}
        response = answer(made, SHORT, NEW - seed, **how)
        patterns.add(np.asarray(response.decisions).tobytes())
        other = [[seed] * 5, [7, 3] * (seed + 1), [4] * (9 + seed)]
        patterns.add(np.asarray(answer(made, other, **SAMPLED).decisions).tobytes())
    assert len(patterns) > 4
    assert sizes() == before


def test_d36_table_is_the_decoded_suffix():
    pieces = ["a", "b.", ",", ".", "\n", ".\n", "3", "3.", "e.g", " .", "", "x,", "?", "!\n", ", "]
    texts = [piece + extra for piece in pieces for extra in ("", "c", ".")]
    rng = np.random.default_rng(0)
    suffix = boundary_table(texts)
    exact = boundary_table(
        texts, "exact_id", encode=lambda text: [texts.index(text)] if text in texts else []
    )
    for _ in range(300):
        ids = rng.integers(0, len(texts), rng.integers(2, 6))
        ids = [i for i in ids if texts[i]] or [0]  # empty pieces show nothing
        last, before = jnp.int32(ids[-1]), jnp.int32(ids[-2] if len(ids) > 1 else 0)
        text = "".join(texts[i] for i in ids)
        assert bool(is_boundary(jnp.asarray(suffix), last, before)) == text.endswith(
            (",", ".", "\n")
        )
        in_table = bool(is_boundary(jnp.asarray(exact), last, before))
        assert in_table == (ids[-1] in [texts.index(d) for d in (",", ".", "\n")])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It ends.", True),
        ("It ends. ", True),
        ("3.", False),  # 3.14, maybe
        ("pi is 3.14", False),
        ("Why?", True),
        ("Go!", True),
        ("a line\n", True),
        ("a, b", False),
        ("one,", False),
    ],
)
@pytest.mark.parametrize("pieces", ["letters", "words"])
def test_d36_sentences_end_where_a_reader_says(text: str, expected: bool, pieces: str):
    """However the text is cut into tokens."""
    parts = list(text) if pieces == "letters" else [text[:-3], text[-3:]]
    texts = sorted({*parts, "-"})
    table = jnp.asarray(boundary_table(texts, "sentence"))
    ids = [texts.index(part) for part in ["-", *parts]]
    if pieces == "letters" and text.endswith(" "):
        return  # a lone space is a token of its own, and no boundary
    assert bool(is_boundary(table, jnp.int32(ids[-1]), jnp.int32(ids[-2]))) is expected


@pytest.mark.experiment  # a prompt without: forks by rank above; both: test_memgen_identity
@pytest.mark.parametrize(("prompt", "inference"), [(0, 2), (3, 0)])
def test_one_kind_without_latents(prompt: int, inference: int):
    """Decisions are recorded, nothing stands between the tokens, and training sees the same."""
    config = weaver_config(prompt_latents=prompt, inference_latents=inference)
    made, response = rollout("shallow", config, AlwaysInvoke())
    tokens, length = whole_rows(PROMPTS, response)
    plan = plan_from_decisions(response.decisions, length, config)
    forced, response = np.asarray(forced_log_probs(made, tokens, plan)), in_numpy(response)
    for row, start in enumerate(length.tolist()):
        np.testing.assert_allclose(
            forced[row, start : start + NEW], response.log_probs[row, :NEW], atol=1e-4
        )
    assert (np.asarray(response.decisions) == 1).any()
    assert set(np.unique(plan.width)) == {0, prompt or inference}


def test_no_inference_events():
    config = dataclasses.replace(CONFIG, max_inference_events=0)
    _, response = rollout("shallow", config, AlwaysInvoke())
    assert (response.decisions[:, 0] == 1).all() and (response.decisions[:, 1:] == -1).all()
    assert response.latents.shape[1] == response.points.shape[1] == 1
    _, usual = rollout("shallow", CONFIG, AlwaysInvoke())
    assert [new[0] for new in response.texts] == [new[0] for new in usual.texts]


def one_line(caught: Any) -> None:
    assert "\n" not in str(caught.value)


def test_too_little_room_is_one_line(session_of_prompts):
    made, request = memgen_of(), make_request(memgen_of(), 20)
    tokens, length = pad_prompts(PROMPTS, VOCAB)
    keys = row_keys(0, PROMPTS)
    with pytest.raises(
        ValueError, match="prompts of 64 tokens do not fit into max_tokens=9"
    ) as caught:
        begin(made, tokens, length, keys, 9)
    one_line(caught)
    session = session_of_prompts(made)
    with pytest.raises(ValueError, match="grow to 117 tokens, .* max_tokens=80: begin") as caught:
        respond(made, session, make_request(made, 80), 128)
    one_line(caught)
    with pytest.raises(ValueError, match="grow to 137 tokens"):
        observe(made, session, jnp.zeros((3, 100), jnp.int32), jnp.array([0, 0, 100]))
    one = dataclasses.replace(make_request(made, 4), prefill=jnp.zeros((1, 16), jnp.int32))
    with pytest.raises(ValueError, match="prefill") as caught:
        respond(made, session, one, 16)
    one_line(caught)
    full = dataclasses.replace(session, capacity=session.capacity - made.config.max_latents)
    with pytest.raises(ValueError, match="grow to .* tokens and latents, .*max_resp") as caught:
        respond(made, full, make_request(made, 43), 64)
    one_line(caught)
    assert request.max_new_tokens == 20


def test_a_learned_trigger_must_be_there():
    none = dataclasses.replace(CONFIG, trigger=None)
    with pytest.raises(ValueError, match="needs a learned trigger and this MemGen has none"):
        generate(memgen_of(config=none), [[1]], 2, policy=LearnedInvoke())
    with pytest.raises(ValueError, match="no decoder of its own"):
        memgen_of(config=trigger_config("reasoner_hidden")).triggering()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "no prompt is given"),
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[VOCAB]]}, "prompt 0 holds token id 100, vocab_size=100"),
        ({"prefills": []}, "0 prefills for 1 prompts: give one for each"),
        ({"prefills": [[1, VOCAB]]}, "prefill 0 holds token id 100, vocab_size=100"),
        ({"prefills": [["a"]]}, "prefill 0 is of type <U1: give integers"),
        ({"prefills": "a"}, "prefill 0 is 'a': give a list of prefills"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"valid_vocab_size": 0}, "valid_vocab_size=0"),
        ({"policy": RandomInvoke(1.5)}, "RandomInvoke.*1.5"),
        ({"policy": LearnedInvoke(0.0, sample=True)}, "LearnedInvoke.*temperature=0.0"),
    ],
)
def test_bad_arguments_are_one_line(arguments: dict[str, Any], message: str):
    defaults: dict[str, Any] = {"prompts": [[1]], "max_new_tokens": 2}
    with pytest.raises(ValueError, match=message) as caught:
        generate(memgen_of(), **{**defaults, **arguments})
    one_line(caught)


def test_nan_is_an_error():
    made = memgen_of()
    weaver = jax.tree.map(lambda leaf: leaf, made.weaver)
    bias = np.array(weaver.to_reasoner.bias[...])
    bias[3] = np.nan
    weaver.to_reasoner.bias[...] = jnp.asarray(bias)
    broken = replaced(made, weaver=weaver)
    with pytest.raises(ValueError, match="prompt 0: the logits are NaN"):
        answer(broken)
