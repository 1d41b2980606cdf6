"""The whole model: plain decoders, execution choices, counts, parameters, configs.

More choices and kinds of decoders: `python -m pytest -m experiment tests/test_model.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import BASE, SMALL, logits_of, quick_model, random_tokens, run

from thoughtbubbles import (
    PRESETS,
    Block,
    ModelConfig,
    PrefixRank,
    Streams,
    Thoughtbubbles,
    Threshold,
    TopK,
)
from thoughtbubbles.attention import attend, attend_reference

DECODERS = {
    "plain": {"fork_layers": ()},
    "forks": {},
    "probability": {"merge": "probability"},
    "copies": {"fork_layers": (), "copies": 3, "merge": "rightmost"},
    "llama": {
        "norm": "rmsnorm",
        "mlp": "swiglu",
        "num_kv_heads": 1,
        "qk_norm": True,
        "tied_head": False,
        "biases": "qkv",
        "mlp_dim": 24,
        "head_dim": 10,
    },
    "prefix-rank": {"policy": PrefixRank(1.5, window=6), "fork_layers": (1, 3)},
    "threshold": {"policy": Threshold(1.5, burst=1), "merge": "probability"},
}


def few_layers(kind, num_layers, fork_layers):
    """The decoder of that kind, with forks there if it has any."""
    forks = fork_layers if DECODERS[kind].get("fork_layers", True) else ()
    fewer = {"num_layers": num_layers, "fork_layers": forks}
    return dataclasses.replace(BASE, **(DECODERS[kind] | fewer))


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def test_without_forks_it_is_the_plain_decoder():
    """Same blocks, forks taken out: what a decoder of the same weights gives."""
    forking = quick_model(dataclasses.replace(BASE, num_layers=3, fork_layers=(2,)))
    plain_config = dataclasses.replace(forking.config, fork_layers=())
    plain = Thoughtbubbles.from_params(plain_config, params_of(forking) | {"forks": {}})
    tokens = random_tokens(2, 9)

    @jax.jit
    def by_hand(model):
        streams = Streams.start(jnp.take(model.embed[...], tokens, axis=0))
        for layer in range(3):
            streams = jax.tree.map(lambda leaf, layer=layer: leaf[layer], model.blocks)(streams)
        return model.final_norm(streams.x) @ model.embed[...].T

    np.testing.assert_allclose(logits_of(plain, tokens), by_hand(forking), atol=2e-5)

    # Before the first fork layer nothing of forking is computed at all.
    assert jax.eval_shape(forking.run, tokens).forks[0].x.shape[1] == 14
    assert not jax.eval_shape(plain.run, tokens).streams.forked


@jax.jit
@jax.value_and_grad
def loss(model, tokens):
    return -model.log_prob(model.run(tokens).streams, tokens).mean()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("forks", {"scan_layers": True, "remat": "full"}),
        *(
            pytest.param(*other, marks=pytest.mark.experiment)
            for other in (
                ("threshold", {"remat": "dots"}),
                ("forks", {"scan_layers": True}),
                ("forks", {"remat": "full"}),
                ("plain", {"scan_layers": True, "remat": "full"}),
                ("prefix-rank", {"scan_layers": True, "remat": "dots"}),
            )
        ),
    ],
    ids=str,
)
def test_execution_choices_change_no_number(kind, changes):
    """Runs of one block and of two."""
    config = few_layers(kind, 3, (1,))
    model = quick_model(config)
    params = nnx.to_pure_dict(nnx.state(model))
    other = Thoughtbubbles.from_params(dataclasses.replace(config, **changes), params)
    tokens = random_tokens(2, 9)
    expected, expected_grads = loss(model, tokens)
    value, grads = loss(other, tokens)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for ours, theirs in zip(
        jax.tree.leaves(params_of(grads)), jax.tree.leaves(params_of(expected_grads)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1, np.abs(theirs).max()))


@pytest.mark.parametrize("kind", DECODERS)
def test_parameter_count(kind):
    config = dataclasses.replace(BASE, **DECODERS[kind])
    model = nnx.eval_shape(lambda: Thoughtbubbles(config, rngs=nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    assert config.num_params() == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build_and_count(preset):
    config = ModelConfig.preset(preset)
    model = nnx.eval_shape(lambda: Thoughtbubbles(config, rngs=nnx.Rngs(0)))
    built = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert built == config.num_params()
    published = {"150m": 150e6, "319m": 319e6, "772m": 772.8e6, "1_9b": 1.916e9}
    if preset in published:
        assert built == pytest.approx(published[preset], rel=0.015)


@pytest.mark.parametrize("kind", DECODERS)
def test_slots_are_those_of_the_streams(kind):
    config = dataclasses.replace(BASE, **DECODERS[kind])
    output = jax.eval_shape(quick_model(config).run, random_tokens(1, 9))
    starts = [start for start, _ in config.groups()][1:]
    slots = config.slots(9)
    assert [slots[start] for start in starts] == [fork.x.shape[1] for fork in output.forks]
    assert slots[-1] == output.streams.x.shape[1]


@pytest.mark.parametrize(
    ("kind", "num_tokens"),
    [*((kind, 130) for kind in DECODERS), ("forks", 16)]
    + [pytest.param(kind, 16, marks=pytest.mark.experiment) for kind in ("plain", "copies")],
)
def test_flop_count_agrees_with_xla(kind, num_tokens):
    """XLA also counts additions, exponentials and comparisons; at this width those are a tenth."""
    wide = {"embed_dim": 128, "mlp_dim": None, "head_dim": None, "vocab_size": 256}
    config = dataclasses.replace(BASE, **(DECODERS[kind] | wide))
    model = nnx.eval_shape(lambda: Thoughtbubbles(config, rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((1, num_tokens), jnp.int32)
    analysis = jax.jit(lambda model, tokens: model(tokens)).lower(model, tokens).cost_analysis()
    assert config.forward_flops(num_tokens) == pytest.approx(analysis["flops"], rel=0.12)
    assert config.forward_flops(num_tokens) < analysis["flops"]


OTHERS = ("plain", "prefix-rank", "threshold")  # merge as others do


@pytest.mark.parametrize(
    "kind",
    [
        *(k for k in DECODERS if k not in OTHERS),
        *(pytest.param(k, marks=pytest.mark.experiment) for k in OTHERS),
    ],
)
def test_log_prob_and_logits_at_agree_with_logits(kind):
    config = few_layers(kind, 2, (0, 1))
    tokens, token = np.asarray(random_tokens(3, 9)), np.array([0, 4, 8])

    @jax.jit
    def all_three(model):
        streams = model.run(tokens).streams
        return model.logits(streams), model.log_prob(streams, tokens), model.logits_at(
            streams, token
        )  # fmt: skip

    logits, log_prob, at = map(np.asarray, all_three(quick_model(config)))
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = np.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(log_prob, expected, atol=2e-5)
    np.testing.assert_allclose(at, logits[np.arange(3), token], atol=2e-5)


@pytest.mark.parametrize(("slots", "groups"), [(64, 2), (150, 1), (150, 4)])
def test_attention_by_blocks_is_attention(slots, groups):
    rng = np.random.default_rng(slots)
    query, key, value = (
        rng.normal(size=(2, slots, heads, 8)).astype(np.float32) for heads in (4, groups, groups)
    )
    bias = rng.uniform(-30, 0, (2, slots)).astype(np.float32)

    def total(function, *args):
        return jnp.sin(function(*args)).sum()

    gradient = jax.jit(jax.value_and_grad(total, (1, 2, 3, 4)), static_argnums=0)
    ours, theirs = (
        gradient(function, query, key, value, bias) for function in (attend, attend_reference)
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(b).max()))


def test_reference_attention_by_hand():
    """Two slots: the second sees the first with weight exp(bias) more or less."""
    query = key = jnp.zeros((1, 2, 1, 2))
    value = jnp.array([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    out = attend_reference(query, key, value, jnp.log(jnp.array([[0.25, 1.0]])))
    np.testing.assert_allclose(out[0, :, 0], [[1.0, 0.0], [0.2, 0.8]], atol=1e-6)


def test_bfloat16_keeps_scores_in_float32():
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    model = Thoughtbubbles.from_params(config, params_of(quick_model(SMALL)))
    streams = run(model, random_tokens(2, 12)).streams
    assert streams.x.dtype == jnp.bfloat16
    assert streams.log_score.dtype == jnp.float32
    assert jax.eval_shape(model, random_tokens(2, 12)).dtype == jnp.float32
    live = np.asarray(streams.log_score)[np.asarray(streams.alive)]
    assert len(np.unique(live)) == len(live), "bfloat16 scores would tie"


def test_a_block_works_alone():
    block = jax.jit(lambda x: Block(BASE, rngs=nnx.Rngs(0))(Streams.start(x)))
    assert block(np.ones((2, 5, 16), np.float32)).x.shape == (2, 5, 16)


def test_from_params_names_what_differs():
    params = params_of(quick_model(BASE))
    with pytest.raises(ValueError, match=r"blocks/attention/k: given \(4, 16, 2, 8\), config asks"):
        Thoughtbubbles.from_params(dataclasses.replace(BASE, num_layers=5), params)
    with pytest.raises(ValueError, match="forks/2/.*: given .*, config asks for none"):
        Thoughtbubbles.from_params(dataclasses.replace(BASE, fork_layers=(1, 2)), params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_heads": 3},
            "num_heads=3 does not divide embed_dim=16: choose a divisor such as 2 or 4",
        ),
        ({"num_kv_heads": 3, "num_heads": 4}, "num_kv_heads=3 does not divide num_heads=4"),
        ({"fork_layers": (1, 4)}, "fork layer 4 is out of range for num_layers=4"),
        ({"fork_layers": (2, 1)}, "must rise"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"merge": "mean"}, "merge='mean': choose one of probability, residual, rightmost"),
        ({"copies": 2}, "copies=2 is a baseline without forks"),
        ({"num_layers": 0}, "num_layers=0 is below 1"),
    ],
)
def test_config_mistakes(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **changes)


def test_policy_and_preset_mistakes():
    with pytest.raises(ValueError, match="ratio=0.9 is below 1"):
        TopK(0.9)
    with pytest.raises(ValueError, match="unknown preset '7b': choose one of tiny"):
        ModelConfig.preset("7b")
    model = quick_model(dataclasses.replace(BASE, policy=TopK(streams=5)))
    with pytest.raises(ValueError, match="streams=5 is less than the 9 tokens of a row"):
        jax.eval_shape(model, random_tokens(1, 9))
