"""The trigger: whether to weave at a boundary, as a rule or learned."""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from memgen.backbone import DecoderBackbone
from memgen.config import TriggerConfig
from memgen.lora import make_adapter


class TriggerParam(nnx.Param):
    """What trigger training moves; metadata as of `WeaverParam`."""


class Trigger(nnx.Module):
    """Two logits, skip and invoke, on a hidden state; and the adapter of the decoder behind it.

    The head begins at zero with a bias, so that every decision starts at `init_invoke_prob`.

    Args:
        backbone: the decoder whose hidden states are read; it is handed to every call.
        config: source and sizes.
        rngs: for the initial values.
    """

    def __init__(self, backbone: DecoderBackbone, config: TriggerConfig, *, rngs: nnx.Rngs):
        self.config = config
        own = config.source != "reasoner_hidden"
        self.adapter = (
            make_adapter(backbone, config.lora, rngs=rngs, kind=TriggerParam) if own else None
        )
        self.kernel = TriggerParam(jnp.zeros((backbone.embed_dim, 2)), inputs=1)
        odds = math.log(config.init_invoke_prob / (1 - config.init_invoke_prob))
        self.bias = TriggerParam(jnp.array([0.0, odds]), inputs=0)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Hidden states `[..., D]` to logits `[..., 2]` float32."""
        return hidden.astype(jnp.float32) @ self.kernel[...] + self.bias[...]


class TriggerPolicy(Protocol):
    """How decisions are made; a pytree."""

    @property
    def learned(self) -> bool:
        """Whether `logits` are the learned trigger's; they are zeros otherwise."""
        ...

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """Logits `[B, 2]` and one key for each row, to `[B]` bool: invoke."""
        ...


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class AlwaysInvoke:
    """At every boundary until the budget is spent."""

    learned = False

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        return jnp.ones(logits.shape[:1], bool)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NeverInvoke:
    """The reasoner alone."""

    learned = False

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        return jnp.zeros(logits.shape[:1], bool)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RandomInvoke:
    """With one probability everywhere."""

    probability: float | jax.Array
    learned = False

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        draw = jax.vmap(lambda key: jax.random.bernoulli(key, self.probability))
        return draw(keys)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LearnedInvoke:
    """What the trained trigger says: the likelier decision, or a sample at a temperature."""

    temperature: float | jax.Array = 1.0
    sample: bool = dataclasses.field(default=False, metadata={"static": True})
    learned = True

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        if not self.sample:
            return logits[:, 1] > logits[:, 0]
        draw = jax.vmap(lambda key, row: jax.random.categorical(key, row / self.temperature))
        return draw(keys, logits) == 1
