"""The trigger, which decides at a boundary whether to weave, and policies for its decisions."""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from memgen.backbone import DecoderBackbone
from memgen.checks import check_config, check_floating, check_rngs, check_width
from memgen.config import TriggerConfig
from memgen.lora import make_adapter
from memgen.module import Module, checked_kernel, named


class TriggerParam(nnx.Param):
    """Parameter of the trigger; its metadata `inputs` is the number of axes a product contracts."""


class Trigger(Module):
    """Linear head with two logits, skip and invoke, and a LoRA adapter of the decoder below it.

    The trigger decides when to weave (arXiv 2509.24704). By default the head's kernel is
    initialised to zero, and the bias such that the probability of invoking is `init_invoke_prob`
    for every input.

    Args:
        backbone: Decoder whose hidden states are the head's input.
        config: Sizes and options of the trigger.
        rngs: PRNG keys that initialise the adapter and the head.
        kernel_init: Initializer of the head's kernel; zeros by default.
        param_dtype: Dtype of the head's parameters. The adapter is float32.

    Raises:
        ValueError: A target of the adapter selects no linear layer of the backbone, or an argument
            has a wrong type.
    """

    def __init__(
        self,
        backbone: DecoderBackbone,
        config: TriggerConfig,
        *,
        rngs: nnx.Rngs,
        kernel_init: Initializer | None = None,
        param_dtype: Dtype = jnp.float32,
    ):
        check_config(config, TriggerConfig)
        check_floating("param_dtype", param_dtype)
        check_rngs(rngs)
        self.config = config
        adapted = config.source != "reasoner_hidden"
        self.adapter = (
            make_adapter(backbone, config.lora, rngs=rngs, kind=TriggerParam) if adapted else None
        )
        shape = backbone.embed_dim, 2
        if kernel_init is None:
            kernel = jnp.zeros(shape, param_dtype)
        else:
            kernel = checked_kernel(kernel_init, rngs.params(), shape, param_dtype)
        self.kernel = named(TriggerParam, kernel, ("embed", None), inputs=1)
        odds = math.log(config.init_invoke_prob / (1 - config.init_invoke_prob))
        self.bias = named(TriggerParam, jnp.array([0.0, odds], param_dtype), (None,))

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Compute logits `[..., 2]` float32 (skip, invoke) from hidden states `[..., D]`.

        Raises:
            ValueError: `D` is not the width of the trigger's decoder.
        """
        check_width(hidden, self.kernel.shape[0], "a trigger")
        return hidden.astype(jnp.float32) @ self.kernel[...] + self.bias[...]


class TriggerPolicy(Protocol):
    """Interface of policies, which decide in each row whether to weave; a policy is a pytree."""

    @property
    def learned(self) -> bool:
        """Whether the policy uses the learned trigger's logits; if False, the logits are zeros."""
        ...

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """Decide from logits `[B, 2]` and PRNG keys `[B]`; return `[B]` bool, True to invoke."""
        ...


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class AlwaysInvoke:
    """Policy that invokes the weaver at every boundary, at most `max_inference_events` times."""

    learned = False

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        return jnp.ones_like(logits[:, 0], bool)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NeverInvoke:
    """Policy that never invokes the weaver: the reasoner generates without latents."""

    learned = False

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        return jnp.zeros_like(logits[:, 0], bool)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RandomInvoke:
    """Policy that invokes the weaver at each boundary with a fixed probability.

    Attributes:
        probability: Probability of invoking, from 0 to 1.
    """

    probability: float | jax.Array
    learned = False

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        draw = jax.vmap(lambda key: jax.random.bernoulli(key, self.probability))
        return draw(keys)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LearnedInvoke:
    """Policy that follows the trained trigger.

    Attributes:
        temperature: Temperature that divides the trigger's logits if `sample` is True.
        sample: Whether to sample decisions; if False, the more probable decision is taken (static).
    """

    temperature: float | jax.Array = 1.0
    sample: bool = dataclasses.field(default=False, metadata={"static": True})
    learned = True

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        if not self.sample:
            return logits[:, 1] > logits[:, 0]
        draw = jax.vmap(lambda key, row: jax.random.categorical(key, row / self.temperature))
        return draw(keys, logits) == 1
