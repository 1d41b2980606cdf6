"""MemGen around a Dragon Hatchling, plain and forking: what the others promise, it keeps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from memgen_tiny import (
    CONFIG,
    HATCHLINGS,
    LORA,
    NEW,
    PROMPTS,
    backbone,
    forced_log_probs,
    in_numpy,
    memgen_of,
    plain_log_probs,
    read,
    rollout,
    weaver_config,
    whole_rows,
)

from memgen import AlwaysInvoke, NeverInvoke, Plan, make_adapter
from memgen.backbone import check_backbone, check_cache
from memgen.insertion import INFERENCE, PROMPT, plan_from_decisions


@pytest.mark.parametrize("kind", HATCHLINGS)
def test_it_is_a_backbone(kind):
    decoder = backbone(kind)
    check_backbone(decoder, "reasoner")
    check_cache(decoder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["hatchling", pytest.param("forking hatchling", marks=pytest.mark.experiment)]
)
def test_generation_with_memory_is_the_teacher_forced_pass(kind):
    """Weaving into a state of fixed size; with forks, which compile for long, policies' too."""
    made, response = rollout(kind, CONFIG, AlwaysInvoke())
    response = in_numpy(response)
    tokens, prompt = whole_rows(PROMPTS, response)
    plan = plan_from_decisions(response.decisions, prompt, CONFIG)
    assert ((np.asarray(plan.point) >= 0).sum(axis=1) >= 2).any()
    forced = np.asarray(forced_log_probs(made, tokens, plan))
    for row, start in enumerate(prompt.tolist()):
        np.testing.assert_allclose(
            forced[row, start : start + NEW], response.log_probs[row, :NEW], atol=1e-4
        )


@pytest.mark.slow
def test_never_weaving_is_the_reasoner():
    made, response = rollout("hatchling", CONFIG, NeverInvoke())
    response = in_numpy(response)
    tokens, prompt = whole_rows(PROMPTS, response)
    log_probs = np.asarray(plain_log_probs(made.reasoner, tokens))
    for row, start in enumerate(np.asarray(prompt)):
        after = log_probs[row, start - 1 : start - 1 + NEW]
        np.testing.assert_allclose(response.log_probs[row, :NEW], after.max(axis=-1), atol=1e-5)


def test_weaving_in_one_pass_is_weaving_event_by_event():
    """Where latents don't see each other: by `positions` and `visible`, in linear attention."""
    made = memgen_of("hatchling", weaver_config(latents_see_latents=False))
    tokens = jnp.asarray(np.random.default_rng(0).integers(100, size=(2, 9)), jnp.int32)
    point = np.array([[2, 6, -1], [4, -1, -1]], np.int32)
    kind = np.broadcast_to([PROMPT, INFERENCE, INFERENCE], point.shape)
    woven = jax.jit(lambda made, plan: made.weave(tokens, plan).latents)
    found = np.asarray(woven(made, Plan.of(jnp.asarray(point), jnp.asarray(kind), made.config)))
    one = jax.jit(lambda m, x, n, k: m.weaver.weave(m.weaving(), x, n, k))
    vectors = np.asarray(made.reasoner.embed_tokens(tokens))
    for event in range(2):
        length = np.maximum(point[:, event], 0)
        alone = np.asarray(one(made, vectors, length, kind[:, event]))
        for row in range(2):
            if point[row, event] >= 0:
                width = 3 if event == 0 else 2
                np.testing.assert_allclose(found[row, event, :width], alone[row, :width], atol=1e-5)


def test_lora_is_beside_and_can_be_merged():
    decoder = backbone("hatchling")
    lora = dataclasses.replace(LORA, targets=("dx", "e"))
    adapter = make_adapter(decoder, lora, rngs=nnx.Rngs(0))
    for low in adapter.values():
        low.b[...] = 0.1 * jax.random.normal(jax.random.key(1), low.b.shape)
    x = np.random.default_rng(0).normal(size=(2, 9, 32)).astype(np.float32)
    beside = read(decoder.apply_lora(adapter), x)
    merged = decoder.merge_lora({name: low.delta for name, low in adapter.items()})
    np.testing.assert_allclose(beside, read(merged, x), atol=1e-4)
    assert np.abs(beside - read(decoder, x)).max() > 0.01
