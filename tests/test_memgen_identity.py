"""Oracle tests A: what must change nothing changes nothing, and only what is trained moves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import memgen_tiny
import numpy as np
import optax
import pytest
from flax import nnx
from memgen_tiny import (
    CONFIG,
    LORA,
    NEW,
    PROMPTS,
    answer,
    backbone,
    filled,
    fresh_memgen,
    in_numpy,
    memgen_of,
    plain_log_probs,
    predictors,
    pure,
    random_tokens,
    read,
    replaced,
    rollout,
    trigger_config,
    weaver_config,
    whole_rows,
)

from memgen import (
    MemGen,
    MemGenConfig,
    NeverInvoke,
    Plan,
    WeaverParam,
    make_adapter,
    sft_loss,
)
from memgen.insertion import INFERENCE, PROMPT, assemble, token_index
from memgen.lora import with_dropout
from memgen.trigger import TriggerParam

TOKENS = random_tokens(2, 12, seed=3)
SUPERVISED = jnp.arange(12) >= jnp.array([[3], [5]])


def plan_of(*points: list[int], config: MemGenConfig = CONFIG) -> Plan:
    """The first point of a row is its prompt event's."""
    point = jnp.array(points, jnp.int32)
    kind = jnp.broadcast_to(jnp.arange(point.shape[1]) > 0, point.shape).astype(jnp.int32)
    return Plan.of(point, kind, config)


def test_memory_is_one_base_and_its_adapters():
    """What a compiled program is given: the reasoner once, for reasoner, weaver and trigger."""

    def size_of(module: nnx.Module) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(module)))

    plan = plan_of([3, 6, -1], [5, 8, -1])

    @functools.partial(jax.jit, keep_unused=True)
    def scores(made: MemGen, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        return predictors(made, tokens, plan), made.trigger_logits(tokens, plan)

    for kind in ("rank", "shallow"):
        made = memgen_of(kind, trigger_config("reasoner_hidden"))
        base = size_of(made.reasoner)
        adapters = size_of(made.weaver) + size_of(made.trigger)
        assert size_of(made) - base - adapters <= made.boundary[...].nbytes
        assert base > 4096, "one more copy would be seen"
    compiled = scores.lower(made, TOKENS).compile()
    given = compiled.memory_analysis().argument_size_in_bytes
    assert base + adapters <= given <= base + adapters + 4096


# Where nobody invokes nothing is woven: the others' caches alone, which tests of their own look at.
OTHERS = [pytest.param(kind, marks=pytest.mark.experiment) for kind in ("plain", "rank", "foreign")]


@pytest.mark.parametrize("kind", ["shallow", *OTHERS])
def test_a1_never_trigger_is_the_reasoner(kind: str):
    made, response = rollout(kind, CONFIG, NeverInvoke())
    response = in_numpy(response)
    tokens, prompt = whole_rows(PROMPTS, response)
    log_probs = np.asarray(plain_log_probs(made.reasoner, tokens))
    for row, start in enumerate(np.asarray(prompt)):
        after = log_probs[row, start - 1 : start - 1 + NEW]
        assert (after.argmax(axis=-1) == response.tokens[row, :NEW]).all()
        np.testing.assert_allclose(response.log_probs[row, :NEW], after.max(axis=-1), atol=1e-5)
    assert (response.points == -1).all()
    assert set(np.unique(response.decisions)) == {-1, 0}


def test_a2_no_latents_is_the_reasoner():
    made = memgen_of(config=weaver_config(prompt_latents=0, inference_latents=0))
    response = answer(made)
    _, never = rollout("shallow", CONFIG, NeverInvoke())
    assert response.texts == never.texts
    np.testing.assert_allclose(response.log_probs, never.log_probs, atol=1e-5)
    assert (np.asarray(response.decisions) == 1).any()


def test_a3_masked_events_are_no_events():
    made, nothing = memgen_of(), plan_of([-1, -1, -1], [-1, -1, -1])
    hidden = np.asarray(predictors(made, TOKENS, nothing))
    plain = read(made.reasoner, np.asarray(made.reasoner.model.embed[...])[np.asarray(TOKENS)])
    np.testing.assert_allclose(hidden[:, 1:], np.asarray(plain)[:, :-1], atol=1e-5)
    assert (np.asarray(token_index(nothing, 12)) == np.arange(12)).all()
    other = replaced(made, weaver=filled(made.weaver, seed=99))
    assert (np.asarray(predictors(other, TOKENS, nothing)) == hidden).all()
    one = in_numpy(plan_of([3, -1, -1], [5, 7, -1]))
    vectors = np.random.default_rng(0).normal(size=(2, 12, 4))
    latents = np.zeros((2, 3, 3, 4))
    used = np.arange(3) < one.width[..., None]
    noisy = np.where(used[..., None], latents, np.nan)
    real = np.arange(21) < (12 + one.width.sum(axis=1))[:, None]
    assembled = jax.jit(assemble)
    streams = [np.where(real[..., None], assembled(vectors, x, one), 0) for x in (latents, noisy)]
    assert (streams[0] == streams[1]).all()


STAGES = {"weaver": WeaverParam, "trigger": TriggerParam}


@functools.partial(jax.jit, static_argnames=("stage", "graphdef"))
def value_and_grad(stage, graphdef, params, rest, plan):
    """The stage's mean loss."""

    def loss(params):
        whole = nnx.merge(graphdef, params, rest)
        if stage == "weaver":
            total, weight = sft_loss(whole, TOKENS, SUPERVISED, plan)
            return total / weight
        logits = whole.trigger_logits(TOKENS, plan)
        return -jax.nn.log_softmax(logits)[..., 1].mean()

    return jax.value_and_grad(loss)(params)


def split_loss(made, stage):
    """The stage's parameters, the rest, their graphdef, and the loss with its gradient."""
    graphdef, params, rest = nnx.split(made, STAGES[stage], ...)
    return params, rest, graphdef, functools.partial(value_and_grad, stage, graphdef)


def named(tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(tree))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.parametrize("stage", ["weaver", "trigger"])
def test_a4_a6_only_the_stage_moves(stage: str):
    made, plan = memgen_of(), plan_of([3, 6, 9], [5, 7, -1])
    params, rest, graphdef, grad = split_loss(made, stage)
    frozen = {name: leaf.copy() for name, leaf in named(rest).items()}
    _, gradients = grad(params, rest, plan)
    kinds = {type(v) for _, v in nnx.to_flat_state(nnx.state(made)) if isinstance(v, nnx.Param)}
    assert {WeaverParam, TriggerParam, nnx.Param} <= kinds
    mine = {"weaver": "weaver", "trigger": "trigger"}[stage]
    assert all(name.startswith(f"['{mine}']") for name in named(params))
    assert all(not name.startswith(f"['{mine}']") for name in frozen)
    assert all(np.abs(leaf).max() > 0 for leaf in named(gradients).values())
    optimiser = optax.adam(0.1)

    @jax.jit
    def step(params, gradients):
        updates, _ = optimiser.update(gradients, optimiser.init(params), params)
        return optax.apply_updates(params, updates)

    moved = nnx.merge(graphdef, step(params, gradients), rest)
    _, new_params, new_rest = nnx.split(moved, STAGES[stage], ...)
    assert all((leaf == frozen[name]).all() for name, leaf in named(new_rest).items())
    before = named(params)
    assert all((leaf != before[name]).any() for name, leaf in named(new_params).items())


def test_a5_gradients_at_the_start():
    made = fresh_memgen()
    both = plan_of([3, 6, 9], [5, 7, -1])
    params, rest, _, grad = split_loss(made, "weaver")
    gradients = named(grad(params, rest, both)[1])
    assert {name.rsplit("['")[-1] for name in gradients} >= {"a']", "b']", "gain']"}
    for name, leaf in gradients.items():
        zero = name.endswith("['a']")
        assert np.isfinite(leaf).all() and (np.abs(leaf).max() == 0) == zero, name
    for plan, absent in (
        (plan_of([3, -1, -1], [5, -1, -1]), "['inference']"),
        (plan_of([-1, 4, 9], [-1, 7, -1]), "['prompt']"),
    ):
        for name, leaf in named(grad(params, rest, plan)[1]).items():
            zero = name.endswith("['a']") or absent in name
            assert np.isfinite(leaf).all() and (np.abs(leaf).max() == 0) == zero, name


def test_gradients_are_finite_where_the_context_is_hidden_states_and_events_are_unused():
    made = memgen_of("shallow", weaver_config(context="hidden"))
    plan = plan_of([3, 6, -1], [-1, -1, -1])
    params, rest, _, grad = split_loss(made, "weaver")
    loss, gradients = grad(params, rest, plan)
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in named(gradients).values())


ALL_MAPS = dataclasses.replace(LORA, targets=("q", "k", "v", "o", "up", "down"))
FOREIGN_MAPS = dataclasses.replace(LORA, targets=("blocks/1/q", "blocks/0/down"))


def adapter_of(decoder, config, seed: int = 0):
    return filled(
        nnx.eval_shape(lambda: make_adapter(decoder, config, rngs=nnx.Rngs(0))), seed=seed
    )


def vectors(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def merged(decoder, adapter, kind: str):
    """The decoder with the adapter's products added to its weights."""
    if kind == "foreign":
        copy = jax.tree.map(lambda leaf: leaf, decoder)
        for name, low in adapter.items():
            part = copy.model
            for step in name.split("/"):
                part = part[int(step)] if step.isdigit() else getattr(part, step)
            part.kernel[...] += low.delta
        return copy
    model = jax.tree.map(lambda leaf: leaf, decoder.model)
    for name, low in adapter.items():
        holder = model.blocks.mlp if name in ("up", "down") else model.blocks.attention
        weight = getattr(holder, name)
        weight[...] += low.delta.reshape(weight.shape)
    return type(decoder)(model)


@pytest.mark.parametrize(("kind", "lora"), [("plain", ALL_MAPS), ("foreign", FOREIGN_MAPS)])
def test_a7_lora_is_beside_and_can_be_merged(kind: str, lora):
    decoder = backbone(kind)
    x = vectors(2, 9, 32)
    read = lambda decoder: np.asarray(memgen_tiny.read(decoder, x))  # noqa: E731
    plain, adapter = read(decoder), adapter_of(decoder, lora)
    beside = read(decoder.apply_lora(adapter))
    assert np.abs(beside - plain).max() > 0.01
    np.testing.assert_allclose(beside, read(merged(decoder, adapter, kind)), atol=1e-5)
    for low in adapter_of(decoder, lora).values():
        delta = low.delta
        low.scale *= 2  # what doubling alpha does
        np.testing.assert_allclose(low.delta, 2 * delta)
        np.testing.assert_allclose(delta, low.a[...] @ low.b[...] * lora.alpha / lora.rank)
    doubled = adapter_of(decoder, dataclasses.replace(lora, alpha=2 * lora.alpha))
    twice = read(decoder.apply_lora(doubled))
    np.testing.assert_allclose(twice, read(merged(decoder, doubled, kind)), atol=1e-5)
    assert np.abs(twice - beside).max() > 0.01
    for low in adapter.values():
        low.b[...] = jnp.zeros_like(low.b[...])
    assert (read(decoder.apply_lora(adapter)) == plain).all()


@pytest.mark.parametrize("kind", ["plain", "foreign"])
def test_dropout_changes_outputs_and_keeps_their_mean(kind: str):
    lora = dataclasses.replace(LORA, dropout=0.5, targets=("q", "v"))
    if kind == "foreign":
        lora = dataclasses.replace(FOREIGN_MAPS, dropout=0.5)
    decoder = backbone(kind)
    adapter = adapter_of(decoder, lora)
    x = vectors(1, 5, 32)
    quiet = np.asarray(read(decoder.apply_lora(with_dropout(adapter, None)), x))
    noisy = [
        np.asarray(read(decoder.apply_lora(with_dropout(adapter, jax.random.key(seed))), x))
        for seed in (0, 0, 1)
    ]
    assert (quiet == read(decoder.apply_lora(adapter), x)).all()
    assert (noisy[0] == noisy[1]).all()
    assert (noisy[0] != noisy[2]).any() and (noisy[0] != quiet).any()
    assert all(low.key is None for low in adapter.values()), "the adapter itself is as it was"
    low = next(iter(adapter.values()))
    inputs = np.ones((4, low.a.shape[-2]), np.float32)

    layer_of = lambda low: jax.tree.map(lambda leaf: leaf[0], low) if low.a.ndim == 3 else low  # noqa: E731

    @jax.jit
    def draws(keys):
        return jax.vmap(lambda key: layer_of(with_dropout({"q": low}, key)["q"])(inputs))(keys)

    found = np.asarray(draws(jax.random.split(jax.random.key(2), 4000)), np.float64)
    sigma = found.std(axis=0) / np.sqrt(len(found))
    assert (np.abs(found.mean(axis=0) - layer_of(low)(inputs)) <= 4.5 * sigma).all()
    assert sigma.min() > 0


def test_dropout_is_the_same_in_a_scan_over_blocks_and_one_by_one():
    """Each block of the stack has a key of its own, whichever way the stack is gone through."""
    decoder = backbone("plain")
    adapter = adapter_of(decoder, dataclasses.replace(LORA, dropout=0.5))
    noisy = with_dropout(adapter, jax.random.key(0))
    config = dataclasses.replace(decoder.model.config, scan_layers=True)
    scanned = type(decoder)(type(decoder.model).from_params(config, pure(decoder.model)))
    x = vectors(2, 6, 32)
    one_by_one = read(decoder.apply_lora(noisy), x)
    np.testing.assert_allclose(read(scanned.apply_lora(noisy), x), one_by_one, atol=1e-5)
    keys = noisy["q"].key
    assert keys is not None and (keys[0] != keys[1]).any()


def test_the_first_tokens_of_the_events_are_of_both_kinds():
    """Guards the plans above: prompt events first, then inference events."""
    plan = plan_of([3, 6, -1])
    assert plan.kind.tolist() == [[PROMPT, INFERENCE, INFERENCE]]
    assert plan.width.tolist() == [[3, 2, 0]]
