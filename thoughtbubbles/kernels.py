"""Fast kernels for score-attenuated attention: splash attention on TPUs, cuDNN on GPUs.

Both kernels compute the same function of the same arguments as `attention.attend`, without an array
`[S, S]`. Neither kernel supports a differentiable bias per key, so the bias is passed as two extra
key channels: with `q' = [q / sqrt(K), 1, 1]` and `k' = [k, high, low]`,
`q'·k' = q·k / sqrt(K) + bias`. `high` is the bias rounded to bfloat16 and `low` the remainder,
because a single bfloat16 channel would change a log-score of -20 by up to 0.06. Accumulated in
float32, the two channels represent 16 bits of the bias with bfloat16 keys, and the exact bias with
float32 keys. The gradient of the bias is the gradient of `low`, whose derivative is 1.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)

from thoughtbubbles.recompute import ATTENTION

LANES = 128
BLOCKS = (512, 384, 256)
CUDNN_WIDTH = 8


def attend_splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Compute `attention.attend` with a Pallas kernel for TPUs (JAX's splash attention).

    Blocks of keys above the diagonal are skipped. XLA can't partition the kernel, so on a mesh call
    this function under `jax.shard_map`.

    Args:
        query: `[B, S, H, K]` queries, float32 or bfloat16.
        key: `[B, S, G, K]` keys of `G` heads, where `G` divides `H` (grouped-query attention).
        value: `[B, S, G, K]` values.
        bias: `[B, S]` float32 bias of each key, added to the logits after their division by
            sqrt(K). None adds nothing.
        interpret: Whether to run the kernel as ordinary XLA operations, on any platform but slowly,
            for tests.

    Returns:
        Attention output `[B, S, H, K]`.
    """
    slots, heads = query.shape[1:3]
    query, key = _with_bias_channels(query, key, bias)
    block = splash_block(slots)
    padding = ((0, 0), (0, 0), (0, -slots % block), (0, 0))
    # Padding comes last, so that the causal mask hides its keys.
    heads_first = [jnp.pad(x.swapaxes(1, 2), padding) for x in (query, key, value)]
    kernel = _splash_kernel(slots + padding[2][1], heads, block, interpret)
    return jax.vmap(kernel)(*heads_first)[:, :, :slots].swapaxes(1, 2)


def splash_block(slots: int) -> int:
    """Return the number of queries, and of keys, that the TPU kernel processes in one block.

    The number is 128 for a row of at most 128 slots. For a longer row it is the size among 512,
    384 and 256 that needs the least padding, or the largest of equally good sizes.
    """
    if slots <= LANES:
        return LANES
    return min(BLOCKS, key=lambda block: (-slots % block, -block))


@functools.lru_cache(maxsize=64)
def _splash_kernel(slots: int, heads: int, block: int, interpret: bool):
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    causal = masks.MultiHeadMask([masks.CausalMask((slots, slots))] * heads)
    # As NumPy arrays, the kernel's block lists are bound to no trace, device or mesh.
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha(
            causal,
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=ATTENTION,
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, kernel)


def attend_cudnn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Compute `attention.attend` with cuDNN's flash attention, for NVIDIA GPUs.

    cuDNN requires the same head width for keys and values, a multiple of 8. So the channels of
    queries, keys and values are zero-padded to the next multiple of 8: of `K + 2` with a bias, of
    `K` without.

    Args:
        query: `[B, S, H, K]` queries, bfloat16 or float16; the padded width is at most 128, or 256
            from compute capability 9.0 on.
        key: `[B, S, G, K]` keys of `G` heads, where `G` divides `H` (grouped-query attention).
        value: `[B, S, G, K]` values.
        bias: `[B, S]` float32 bias of each key, added to the logits after their division by
            sqrt(K). None adds nothing.
        implementation: Implementation of the attention. "xla", for tests, runs on any platform but
            materializes arrays `[B, H, S, S]`.

    Returns:
        Attention output `[B, S, H, K]`.

    Raises:
        RuntimeError: cuDNN is missing, or can't run this dtype or width on this GPU.
        ValueError: JAX does not support this dtype or width with cuDNN.
    """
    width = query.shape[3]
    query, key = _with_bias_channels(query, key, bias)
    wide = -(-query.shape[3] // CUDNN_WIDTH) * CUDNN_WIDTH
    query, key, value = (
        jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, wide - x.shape[3]))) for x in (query, key, value)
    )
    mixed = jax.nn.dot_product_attention(
        query, key, value, scale=1.0, is_causal=True, implementation=implementation
    )
    return mixed[..., :width]


def _with_bias_channels(query, key, bias):
    """Divide the query by sqrt(K); with a bias, append two channels to query and key."""
    query = query * query.shape[3] ** -0.5
    if bias is None:
        return query, key
    # Not a cast to bfloat16 and back, which XLA may remove.
    high = jax.lax.stop_gradient(jax.lax.reduce_precision(bias, exponent_bits=8, mantissa_bits=7))
    parts = jnp.stack([high, bias - high], axis=-1)[:, :, None]
    # Cast after the broadcast, so that the gradient is summed over heads in float32.
    parts = jnp.broadcast_to(parts, (*key.shape[:3], 2)).astype(key.dtype)
    ones = jnp.ones((*query.shape[:3], 2), query.dtype)
    return jnp.concatenate([query, ones], axis=-1), jnp.concatenate([key, parts], axis=-1)
