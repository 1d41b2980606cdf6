"""A cache is filled by the kernel that the model was built with."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import quick_model, random_tokens

from thoughtbubbles import ModelConfig, PrefixRank, Thoughtbubbles
from thoughtbubbles.cache import decode_step, init_cache, prefill
from thoughtbubbles.kernels import attend_cudnn, attend_splash

CONFIG = ModelConfig(
    vocab_size=17,
    embed_dim=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    fork_layers=(1,),
    policy=PrefixRank(1.5),
)
KERNELS = {
    "splash": partial(attend_splash, interpret=True),
    "cudnn": partial(attend_cudnn, implementation="xla"),
}
TOKENS = 12


def with_attention(config: ModelConfig, attend) -> Thoughtbubbles:
    params = nnx.to_pure_dict(nnx.state(quick_model(config)))
    return Thoughtbubbles.from_params(config, params, attend=attend)


@pytest.mark.parametrize(("kernel", "scan"), [("splash", False), ("cudnn", True)])
def test_prefill_by_a_kernel_is_the_blockwise_pass(kernel, scan):
    config = dataclasses.replace(CONFIG, scan_layers=scan)
    tokens, length = random_tokens(2, TOKENS), np.array([TOKENS - 1, 7])
    expected = jax.jit(Thoughtbubbles.__call__)(quick_model(config), tokens)
    model = with_attention(config, KERNELS[kernel])
    logits, cache = prefill(model, init_cache(model, 2, TOKENS), tokens, jnp.asarray(length))
    rows = np.arange(2)
    np.testing.assert_allclose(logits, expected[rows, length - 1], rtol=0, atol=1e-5)
    logits, _ = decode_step(model, cache, tokens[rows, length])
    np.testing.assert_allclose(logits, expected[rows, length], rtol=0, atol=1e-4)


def test_every_block_of_a_prefill_runs_the_kernel_once_and_a_decode_step_none():
    seen = []

    def recording(query, key, value, bias):
        seen.append((query.shape[1], bias is not None))
        return attend_splash(query, key, value, bias, interpret=True)

    model, tokens = with_attention(CONFIG, recording), random_tokens(1, 6)
    cache = jax.eval_shape(partial(init_cache, model, 1, TOKENS))
    _, cache = jax.eval_shape(partial(prefill, model), cache, tokens)
    assert seen == [(6, False), (9, True)]
    jax.eval_shape(partial(decode_step, model), cache, tokens[:, 0])
    assert len(seen) == 2
