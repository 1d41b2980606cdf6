"""Models and inputs of benchmarks: sizes, random parameters and random tokens."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx

from thoughtbubbles import ModelConfig, Thoughtbubbles


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """Sizes of a decoder with random parameters.

    Attributes:
        embed_dim: Width of the residual streams.
        num_layers: Number of blocks.
        num_heads: Number of attention heads of a block.
    """

    embed_dim: int = 256
    num_layers: int = 6
    num_heads: int = 4

    def model_config(self, vocab_size: int, **options: Any) -> ModelConfig:
        """Return the config of a decoder of these sizes.

        Args:
            vocab_size: Number of token ids.
            options: Further fields of `ModelConfig`.
        """
        return ModelConfig(
            vocab_size=vocab_size,
            embed_dim=self.embed_dim,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            **options,
        )


@dataclasses.dataclass(frozen=True)
class SmolLM2Sizes:
    """Sizes of a plain decoder with random parameters; by default those of SmolLM2-135M.

    Attributes:
        vocab_size: Number of token ids.
        embed_dim: Width of the residual streams.
        num_layers: Number of blocks.
        num_heads: Number of attention heads of a block.
        num_kv_heads: Number of key/value heads of a block.
        mlp_dim: Hidden width of the MLP.
    """

    vocab_size: int = 49_152
    embed_dim: int = 576
    num_layers: int = 30
    num_heads: int = 9
    num_kv_heads: int = 3
    mlp_dim: int = 1536

    def model_config(self) -> ModelConfig:
        """Return the config of a decoder of these sizes, with RMSNorm and SwiGLU as in Llama."""
        names = [field.name for field in dataclasses.fields(SmolLM2Sizes)]
        sizes = {name: getattr(self, name) for name in names}
        return ModelConfig(**sizes, norm="rmsnorm", mlp="swiglu", biases="none")


def random_model(config: ModelConfig) -> Thoughtbubbles:
    """Make a model with random parameters; a model's speed does not depend on their values."""
    return jax.jit(lambda: Thoughtbubbles(config, rngs=nnx.Rngs(0)))()


def random_tokens(vocab_size: int, *shape: int) -> np.ndarray:
    """Sample uniformly random token ids `[*shape]`, int32; all calls use the same seed."""
    return np.random.default_rng(0).integers(0, vocab_size, shape, dtype=np.int32)
