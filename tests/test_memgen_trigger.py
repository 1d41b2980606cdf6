"""Oracle tests E: what the trigger sees, and when."""

import dataclasses
from typing import Any

import jax
import memgen_reference as oracle
import numpy as np
import pytest
from memgen_tiny import (
    CONFIG,
    LORA,
    backbone,
    filled,
    fresh_memgen,
    in_numpy,
    memgen_of,
    pure,
    random_tokens,
    replaced,
    trigger_config,
)

from memgen import MemGen, Plan, TriggerConfig
from memgen.insertion import INFERENCE, PROMPT

TOKENS = np.asarray(random_tokens(2, 10, seed=6))
POINT = np.array([[3, 5, 8], [4, -1, -1]], np.int32)
KIND = np.array([[PROMPT, INFERENCE, INFERENCE]] * 2, np.int32)
PLAN = in_numpy(Plan.of(POINT, KIND, CONFIG))


@jax.jit
def logits_of(made: MemGen, tokens: jax.Array, plan: Plan) -> jax.Array:
    return made.trigger_logits(tokens, plan)


def trigger_logits(made: MemGen, tokens: np.ndarray, plan: Plan) -> np.ndarray:
    return np.asarray(logits_of(made, tokens, plan))


@jax.jit
def inputs_of(made: MemGen, tokens: jax.Array, plan: Plan) -> jax.Array:
    return made.weave(tokens, plan).inputs_embeds


@pytest.mark.parametrize("source", ["tokens", "stream", "reasoner_hidden"])
def test_e37_one_pass_is_step_by_step(source: Any):
    """Step by step by the oracle: the decision before token i sees all that stands before it."""
    made = memgen_of(config=trigger_config(source))
    found = trigger_logits(made, TOKENS, PLAN)
    assert found.shape == (2, 10, 2)
    params, trigger = pure(made.reasoner.model), pure(made.trigger)
    adapter = trigger.get("adapter") or {}
    merged = oracle.merged(params, adapter, LORA.alpha / LORA.rank)
    decoder = oracle.thoughtbubbles(merged, made.reasoner.model.config)
    inputs_embeds = np.asarray(inputs_of(made, TOKENS, PLAN), np.float64)
    for row in range(2):
        for i in range(1, 10):
            before = [int(PLAN.width[row, e]) for e in range(3) if 0 <= POINT[row, e] < i]
            seen = inputs_embeds[row, : i + sum(before)]
            if source == "tokens":
                seen = decoder.embed(TOKENS[row, :i].tolist())
            expected = oracle.trigger_logits(trigger, decoder, seen)
            np.testing.assert_allclose(found[row, i], expected, atol=1e-5)
    assert (found[:, 0] == 0).all(), "nothing stands before the first token"


def test_e38_softmax_is_sigmoid_of_the_difference():
    logits = trigger_logits(memgen_of(), TOKENS, PLAN)
    np.testing.assert_allclose(
        jax.nn.softmax(logits)[..., 1],
        jax.nn.sigmoid(logits[..., 1] - logits[..., 0]),
        atol=1e-6,
    )


@pytest.mark.parametrize("source", ["tokens", "stream", "reasoner_hidden"])
def test_e39_whether_latents_are_seen(source: Any):
    made = memgen_of(config=trigger_config(source))
    other = replaced(made, weaver=filled(made.weaver, seed=77))
    found, moved = (trigger_logits(m, TOKENS, PLAN) for m in (made, other))
    assert (found[:, :4] == moved[:, :4])[0].all(), "before the first latent nothing differs"
    if source == "tokens":
        assert (found == moved).all()
        nothing = in_numpy(Plan.of(np.full_like(POINT, -1), KIND, CONFIG))
        assert (trigger_logits(made, TOKENS, nothing) == found).all()
    else:
        assert np.abs(found[0, 4:] - moved[0, 4:]).max() > 1e-3


@pytest.mark.parametrize("source", ["tokens", "stream", "reasoner_hidden"])
def test_e40_the_prompt_decision_is_of_the_last_prompt_token(source: Any):
    """A marker at the prompt's last place moves it; one at the response's first does not."""
    made = memgen_of(config=trigger_config(source))
    found = trigger_logits(made, TOKENS, PLAN)
    for row, start in enumerate((3, 4)):
        last, first = TOKENS.copy(), TOKENS.copy()
        last[row, start - 1] += 1
        assert np.abs(trigger_logits(made, last, PLAN)[row, start] - found[row, start]).max() > 1e-3
        first[row, start] += 1
        assert (
            trigger_logits(made, first, PLAN)[row, : start + 1] == found[row, : start + 1]
        ).all()


def test_a_trigger_begins_at_the_probability_it_is_given():
    config = dataclasses.replace(
        CONFIG, trigger=TriggerConfig("tokens", init_invoke_prob=0.2, lora=LORA)
    )
    logits = trigger_logits(fresh_memgen(config=config), TOKENS, PLAN)
    np.testing.assert_allclose(jax.nn.softmax(logits[:, 1:])[..., 1], 0.2, atol=1e-6)


def test_a_trigger_that_cannot_read_is_one_line():
    from flax import nnx
    from memgen_tiny import BOUNDARY

    reasoner, wide = backbone("plain"), backbone("plain", 48)

    def built(source: Any):
        return MemGen(
            reasoner,
            trigger_config(source),
            boundary=BOUNDARY,
            trigger_backbone=wide,
            rngs=nnx.Rngs(0),
        )

    with pytest.raises(
        ValueError, match="a trigger of width 48 does not fit the stream of width 32"
    ):
        nnx.eval_shape(lambda: built("stream"))
    made = nnx.eval_shape(lambda: built("tokens"))
    assert made.trigger is not None and made.trigger.kernel.shape == (48, 2)
