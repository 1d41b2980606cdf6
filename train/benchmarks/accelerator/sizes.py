"""Sizes of all measurements: full sizes for an accelerator, tiny sizes for a test on a CPU."""

import dataclasses

from thoughtbubbles import ModelConfig, PrefixRank


@dataclasses.dataclass(frozen=True)
class KernelShape:
    """Sizes of one attention call: rows, slots, heads, key/value heads, and width of a head."""

    batch: int
    slots: int
    heads: int
    kv_heads: int
    width: int

    @property
    def flops(self) -> int:
        """FLOPs of a forward call: two products over the causal half of all pairs of slots."""
        return 2 * self.batch * self.slots**2 * self.heads * self.width

    def __str__(self) -> str:
        return f"{self.batch}x{self.slots}x{self.heads}/{self.kv_heads}x{self.width}"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Models and sizes that the parts measure.

    Attributes:
        kernels: Sizes of attention calls.
        models: Mapping from names to configs of decoders that are trained.
        seq_len: Number of tokens per row in training.
        first_batch: Number of rows of the first training step that is tried.
        largest_batch: Maximum number of rows that is tried.
        decoders: Mapping from names to configs of decoders that generate.
        decode_batches: Batch sizes of decoding, with one measurement for each size.
        context: Number of tokens in the cache when the timed decoding steps begin.
        new_tokens: Number of timed decoding steps.
        rl_model: Config of a decoder over bytes that reinforcement learning trains.
        rl_prompts: Number of problems of a reinforcement-learning step.
        rl_generations: Number of rollouts of a problem.
        rl_tokens: Maximum number of tokens of a rollout.
        precision_models: Mapping from names to configs of decoders whose loss curves are compared.
        precision_batch: Number of rows of a training step in the part "precision".
        precision_steps: Number of training steps in the part "precision".
        calls: Number of calls in a timed round.
    """

    kernels: tuple[KernelShape, ...]
    models: dict[str, ModelConfig]
    seq_len: int
    first_batch: int
    largest_batch: int
    decoders: dict[str, ModelConfig]
    decode_batches: tuple[int, ...]
    context: int
    new_tokens: int
    rl_model: ModelConfig
    rl_prompts: int
    rl_generations: int
    rl_tokens: int
    precision_models: dict[str, ModelConfig]
    precision_batch: int
    precision_steps: int
    calls: int


def _pair(config: ModelConfig) -> dict[str, ModelConfig]:
    plain = dataclasses.replace(config, fork_layers=())
    return {"plain": plain, "bubbles": config}


def _cacheable(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(
        config, policy=PrefixRank(2.0), score_originals=False, merge="residual"
    )


def full_sizes() -> Sizes:
    """Return the sizes for an accelerator: preset 150m, and decoders of 30 million parameters."""
    trained = ModelConfig.preset("150m", dtype="bfloat16", scan_layers=True, remat="dots")
    small = ModelConfig(
        vocab_size=8192, embed_dim=512, num_layers=8, num_heads=8, fork_layers=(2, 4),
        dtype="bfloat16", scan_layers=True,
    )  # fmt: skip
    decoder = _cacheable(ModelConfig.preset("150m", dtype="bfloat16"))
    return Sizes(
        kernels=(
            KernelShape(8, 1024, 12, 12, 64),
            KernelShape(8, 1024, 12, 4, 64),
            KernelShape(2, 4096, 8, 8, 128),
        ),
        models=_pair(trained),
        seq_len=512,
        first_batch=16,
        largest_batch=4096,
        decoders=_pair(decoder),
        decode_batches=(1, 8, 64),
        context=512,
        new_tokens=64,
        rl_model=dataclasses.replace(small, vocab_size=320, fork_layers=(), scan_layers=False),
        rl_prompts=32,
        rl_generations=8,
        rl_tokens=32,
        precision_models=_pair(small),
        precision_batch=32,
        precision_steps=100,
        calls=10,
    )


def tiny_sizes() -> Sizes:
    """Return sizes that a CPU can run in a test; their times say nothing about speed."""
    model = ModelConfig(vocab_size=257, embed_dim=16, num_layers=1, num_heads=2, fork_layers=(0,))
    model = dataclasses.replace(model, scan_layers=True)
    decoder = dataclasses.replace(model, scan_layers=False)
    return Sizes(
        kernels=(KernelShape(1, 16, 2, 1, 8),),
        models=_pair(model),
        seq_len=16,
        first_batch=2,
        largest_batch=2,
        decoders={"bubbles": decoder},
        decode_batches=(1,),
        context=4,
        new_tokens=2,
        rl_model=dataclasses.replace(decoder, fork_layers=()),
        rl_prompts=1,
        rl_generations=2,
        rl_tokens=4,
        precision_models={"plain": dataclasses.replace(model, fork_layers=())},
        precision_batch=2,
        precision_steps=3,
        calls=1,
    )
