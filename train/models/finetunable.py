"""Modules that fine-tuning trains: a whole decoder, a LoRA adapter, a weaver, or a trigger."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memgen import (
    LoRAConfig,
    MemGen,
    MemGenConfig,
    TriggerParam,
    WeaverParam,
    make_adapter,
    plan_insertions,
    token_log_probs,
)
from memgen.lora import with_dropout
from thoughtbubbles import Architecture
from train.data.chat_data import segment_mask

Method = Literal["all", "lora", "weaver", "trigger"]


class AdapterParam(nnx.Param):
    """Parameter of a LoRA adapter of the decoder."""


class ValueParam(nnx.Param):
    """Parameter of a value head."""


TRAINED = {"all": nnx.Param, "lora": AdapterParam, "weaver": WeaverParam, "trigger": TriggerParam}


class ValueHead(nnx.Module):
    """Linear layer from a hidden state h to a value, V = w · h + b in float32; w and b start at 0.

    Args:
        embed_dim: Width of the hidden states.
    """

    def __init__(self, embed_dim: int):
        self.kernel = ValueParam(jnp.zeros(embed_dim, jnp.float32))
        self.bias = ValueParam(jnp.zeros((), jnp.float32))

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Compute the values `[...]`, float32, of hidden states `[..., D]`."""
        kernel, hidden = self.kernel[...], hidden.astype(jnp.float32)
        return jnp.matmul(hidden, kernel, precision=jax.lax.Precision.HIGHEST) + self.bias[...]


class FinetunableModel(nnx.Module):
    """A decoder with the modules that fine-tuning adds, and methods that score rows of chat data.

    Args:
        model: Decoder; frozen unless `method` is `all`.
        method: Trained parameters: `all` trains the decoder, `lora` a LoRA adapter, `weaver` a
            weaver of latent memory, and `trigger` the trigger of a frozen weaver.
        lora: Config of the adapter; used only by `lora`.
        memgen: Config of latent memory; used only by `weaver` and `trigger`.
        boundary: Boundary table `[V]` of the vocabulary (`memgen.boundary_table`) for `weaver` and
            `trigger`; None for `all` and `lora`.
        rngs: PRNG keys for the initial values of new parameters.
        value_head: Whether a `ValueHead` on the hidden states is added. Its parameters are
            `ValueParam`s.

    Raises:
        ValueError: `method` is unknown, or the decoder takes adapters but can't merge them.
    """

    def __init__(
        self,
        model: Architecture,
        method: Method,
        *,
        lora: LoRAConfig,
        memgen: MemGenConfig,
        boundary: np.ndarray | None,
        rngs: nnx.Rngs,
        value_head: bool = False,
    ):
        if method not in get_args(Method):
            raise ValueError(f"method={method!r}: choose from {', '.join(get_args(Method))}")
        self.method = method
        decoder = model.backbone()
        woven = method in ("weaver", "trigger")
        self.model = None if woven else model
        self.adapter = (
            make_adapter(decoder, lora, rngs=rngs, kind=AdapterParam) if method == "lora" else None
        )
        if method == "lora" and _unmergeable(decoder):
            raise ValueError(
                f"{type(decoder).__name__} takes adapters and can't merge them, so that the run "
                "could not be read again: add merge_lora to it"
            )
        self.memgen = MemGen(decoder, memgen, boundary=boundary, rngs=rngs) if woven else None
        self.value_head = ValueHead(decoder.embed_dim) if value_head else None

    @classmethod
    def whole(cls, model: Architecture) -> "FinetunableModel":
        """Wrap a decoder with method `all`, without an adapter, latent memory or a value head.

        Args:
            model: Decoder.
        """
        unused: Any = {"lora": LoRAConfig(), "memgen": MemGenConfig(), "boundary": None}
        return cls(model, "all", **unused, rngs=nnx.Rngs(0))

    @property
    def backbone(self) -> Any:
        """The decoder without an adapter or latent memory, a `memgen.DecoderBackbone`."""
        return self.memgen.reasoner if self.memgen is not None else self.model.backbone()  # pyright: ignore

    def log_probs(self, rows: dict[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
        """Compute the log-probabilities of the targets, the tokens 1 to T of each row.

        Args:
            rows: Mapping from name to array `[B, T + 1]`: `tokens`, `loss_mask`, `segment`, and
                `position` if rows are packed (see `ChatRows`).
            key: PRNG key of dropout and random insertion in training; None for held-out rows.

        Returns:
            Log-probabilities `[B, T]` float32; 0 for targets outside of the loss mask.
        """
        targets, loss_mask = jnp.maximum(rows["tokens"], 0)[:, 1:], rows["loss_mask"][:, 1:]
        return token_log_probs(self.backbone, self.predictors(rows, key), targets, loss_mask)

    def predictors(self, rows: dict[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
        """Compute the hidden states `[B, T, D]` that predict the targets of `log_probs`.

        Args:
            rows: Mapping from name to array `[B, T + 1]`, as in `log_probs`.
            key: PRNG key of dropout and random insertion in training; None for held-out rows.
        """
        tokens = jnp.maximum(rows["tokens"], 0)
        if self.memgen is None:
            return self._plain_predictors(tokens[:, :-1], rows, key)
        return self._woven_predictors(tokens, rows["loss_mask"], key)

    def _plain_predictors(self, inputs, rows, key):
        decoder = self.backbone
        if self.adapter is not None:
            decoder = decoder.apply_lora(with_dropout(self.adapter, key))
        x = decoder.embed_tokens(inputs)
        segment = rows["segment"][:, :-1]
        if "position" not in rows:  # one conversation in a row
            return decoder.hidden_states(x, (segment >= 0).sum(axis=1, dtype=jnp.int32))
        position = rows["position"][:, :-1]
        return decoder.hidden_states(x, positions=position, visible=segment_mask(segment))

    def _woven_predictors(self, tokens, loss_mask, key):
        memgen = self.memgen
        assert memgen is not None
        where = what = None
        if key is not None:
            where, what = jax.random.split(key)
        elif memgen.config.insertion == "random":
            where = jax.random.key(0)  # held-out rows: the same positions each time
        plan = plan_insertions(tokens, loss_mask, memgen.boundary[...], memgen.config, where)
        return memgen.predictors(tokens, plan, what)[:, 1:]


def _unmergeable(decoder: Any) -> bool:
    """Whether a decoder lacks `merge_lora` or inherits `Architecture.merge_lora`, which raises."""
    return getattr(type(decoder), "merge_lora", None) in (None, Architecture.merge_lora)
