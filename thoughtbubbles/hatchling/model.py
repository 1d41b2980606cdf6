"""Dragon Hatchling: one layer of neurons, applied again and again, with a state for the past.

Parallel, chunked and recurrent computation are one function, `Hatchling._chunk`: a chunk of tokens
attends among itself by a matrix of scores and to everything before it by the state.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from thoughtbubbles.architecture import Architecture, Constrain
from thoughtbubbles.hatchling.config import HatchlingConfig
from thoughtbubbles.layers import weight

NORM_EPS = 1e-5


class Frequency(nnx.Variable):
    """Rotary frequencies in turns per token; a constant that checkpoints keep, since a model that
    has grown keeps the frequencies of its old neurons."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What a Hatchling keeps of the tokens that it has read; its size does not grow with them.

    Attributes:
        length: Number of tokens so far, `[B]` int32.
        synapses: Sum of outer products of rotated neurons and values in each layer,
            `[L, B, H, N, d]` float32 (ρ of the paper).
    """

    length: jax.Array
    synapses: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Activations:
    """Result of a forward pass.

    Attributes:
        hidden: Hidden states `[B, T, d]`.
        tokens: Number of real tokens, float32.
        x_active: Number of neurons x above 0 in each layer, over all tokens, `[L]` float32.
        y_active: Number of gated neurons y above 0 in each layer, over all tokens, `[L]` float32.
    """

    hidden: jax.Array
    tokens: jax.Array
    x_active: jax.Array
    y_active: jax.Array


class Hatchling(Architecture):
    """A Dragon Hatchling (BDH, arXiv 2509.26507), in the released form or the paper's.

    Args:
        config: Sizes and options of the model.
        rngs: Keys of the initial values.
        constrain: Function applied to every residual array `[B, T, d]` between layers.
        attend: Not used: attention is linear.
    """

    config_class: ClassVar[type[HatchlingConfig]] = HatchlingConfig
    config: HatchlingConfig

    def __init__(
        self,
        config: HatchlingConfig,
        *,
        rngs: nnx.Rngs,
        constrain: Constrain | None = None,
        attend: Any = None,
    ):
        self.config, self.constrain = config, constrain or _identity
        width, heads, neurons = config.embed_dim, config.num_heads, config.head_neurons
        into, out_of = ("embed", "heads", "head_dim"), ("heads", "head_dim", "embed")
        self.embed = weight(rngs, (config.vocab_size, width), ("vocab", "embed"))
        self.dx = weight(rngs, (width, heads, neurons), into)
        self.dy = weight(rngs, (width, heads, neurons), into)
        self.e = weight(rngs, (heads, neurons, width), out_of, inputs=2)
        self.head = weight(rngs, (width, config.vocab_size), ("embed", "vocab"))
        self.frequency = Frequency(
            jnp.tile(frequencies(neurons, config.rope_base), (heads, 1)), axes=("heads", "head_dim")
        )
        self.adapters = nnx.data(None)

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """Vectors `[..., d]`; NaN for an id outside the vocabulary."""
        return jnp.take(self.embed[...], tokens, axis=0).astype(self.config.dtype)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits `[..., V]` float32 of hidden states `[..., d]`."""
        table = self.head[...].astype(hidden.dtype)
        return jnp.einsum("...d,dv->...v", hidden, table, preferred_element_type=jnp.float32)

    def hidden_states(
        self,
        x: jax.Array,
        length: jax.Array | None = None,
        *,
        positions: jax.Array | None = None,
        visible: jax.Array | None = None,
    ) -> jax.Array:
        if positions is not None or visible is not None:
            raise ValueError("a Hatchling reads rows from left to right: leave positions out")
        return self._forward(x.astype(self.config.dtype), length).hidden

    def run(
        self,
        tokens: jax.Array,
        length: jax.Array | None = None,
        *,
        track: bool = False,
        key: jax.Array | None = None,
    ) -> Activations:
        """A forward pass without the head; `key` is that of dropout, in training."""
        return self._forward(self.embed_tokens(tokens), length, key)

    def logits(self, output: Activations | jax.Array) -> jax.Array:
        return self.unembed(_hidden_of(output))

    def logits_at(self, output: Activations | jax.Array, position: jax.Array) -> jax.Array:
        return super().logits_at(_hidden_of(output), position)

    def init_cache(self, batch: int, max_tokens: int) -> State:
        """The state of `batch` empty rows; it has no limit, whatever `max_tokens` says."""
        if batch < 1:
            raise ValueError(f"batch={batch}: choose 1 or more")
        config = self.config
        shape = (config.num_layers, batch, config.num_heads, config.head_neurons, config.embed_dim)
        return State(jnp.zeros((batch,), jnp.int32), jnp.zeros(shape))

    def cache_batch_axes(self, cache: State) -> State:
        """Axis of the rows in each array of a state."""
        return State(0, 1)  # pyright: ignore[reportArgumentType]

    def extend(
        self, cache: State, x: jax.Array, length: jax.Array, *, fresh: bool = False
    ) -> tuple[jax.Array, State]:
        """Append vectors to rows of unequal length; a length that they lack makes its row NaN."""
        if cache.length.shape[0] != x.shape[0]:
            raise ValueError(
                f"a state of {cache.length.shape[0]} rows for vectors of {x.shape[0]}: begin with "
                "init_cache of that batch"
            )
        if not x.shape[1]:
            return x.astype(self.config.dtype), cache
        read, cache = self._chunks(x.astype(self.config.dtype), length, cache, None, fresh)
        wrong = (length > x.shape[1])[:, None, None]  # a length that the vectors do not have
        return jnp.where(wrong, jnp.nan, read.hidden), cache

    @property
    def lora_targets(self) -> Mapping[str, tuple[tuple[int, ...], int, int]]:
        """Dx, which makes neurons of vectors, and E, which makes vectors of neurons."""
        width, neurons = self.config.embed_dim, self.config.num_neurons
        return {"dx": ((), width, neurons), "e": ((), neurons, width)}

    def apply_lora(self, adapter: Mapping[str, Any]) -> "Hatchling":
        """The same arrays with an adapter added to Dx and E."""
        if unknown := sorted(set(adapter) - set(self.lora_targets)):
            raise ValueError(
                f"no linear layer {unknown[0]!r}: choose from {', '.join(self.lora_targets)}"
            )
        if self.adapters is not None:
            raise ValueError("this model has an adapter already")
        leaves, structure = jax.tree.flatten(self)
        model: Hatchling = jax.tree.unflatten(structure, leaves)
        model.adapters = nnx.data(dict(adapter))
        return model

    def merge_lora(self, deltas: Mapping[str, jax.Array]) -> "Hatchling":
        """The model with `deltas [inputs, outputs]` added to Dx and E."""
        leaves, structure = jax.tree.flatten(self)
        model: Hatchling = jax.tree.unflatten(structure, leaves)
        for name, delta in deltas.items():
            kernel = {"dx": model.dx, "e": model.e}[name]
            # Not kernel[...] = ...: that writes into NumPy arrays, which the other model shares.
            kernel.set_value(kernel[...] + delta.reshape(kernel.shape).astype(kernel.dtype))
        return model

    def statistics(self, output: Activations) -> dict[str, jax.Array]:
        """Sums over a batch: `tokens`, and active neurons `x [L]`, `y [L]`."""
        return {"tokens": output.tokens, "x": output.x_active, "y": output.y_active}

    @classmethod
    def step_metrics(cls, config: HatchlingConfig, sums: Mapping[str, Any]) -> dict[str, Any]:
        """Share of neurons that are active, x before and y after the gate, by layer."""
        if "x" not in sums:
            return {}
        neurons = max(float(sums["tokens"]), 1.0) * config.num_neurons
        return {
            f"layer_{layer}/{name}_active": float(np.asarray(sums[name])[layer]) / neurons
            for layer in range(config.num_layers)
            for name in ("x", "y")
        }

    def _forward(
        self, x: jax.Array, length: jax.Array | None, key: jax.Array | None = None
    ) -> Activations:
        if length is None:
            length = jnp.full(x.shape[:1], x.shape[1], jnp.int32)
        if self.config.chunk is None or x.shape[1] <= self.config.chunk:
            return self._chunk(x, length, None, key)[0]
        return self._chunks(x, length, self.init_cache(x.shape[0], x.shape[1]), key)[0]

    def _chunks(
        self,
        x: jax.Array,
        length: jax.Array,
        state: State,
        key: jax.Array | None,
        fresh: bool = False,
    ) -> tuple[Activations, State]:
        """Read rows of any length chunk by chunk."""
        size = x.shape[1] if self.config.chunk is None else min(self.config.chunk, x.shape[1])
        count = -(-x.shape[1] // size)
        if count == 1:
            read, new = self._chunk(x, length, state, key, fresh)
            assert new is not None
            return read, new
        padded = jnp.pad(x, ((0, 0), (0, count * size - x.shape[1]), (0, 0)))
        parts = padded.reshape(x.shape[0], count, size, x.shape[2]).swapaxes(0, 1)

        def step(state: State, inputs: tuple[jax.Array, jax.Array]) -> tuple[Any, Activations]:
            index, part = inputs
            here = jnp.clip(length - index * size, 0, size)
            own = None if key is None else jax.random.fold_in(key, index)
            read, state = self._chunk(part, here, state, own)  # pyright: ignore
            return state, read

        state, read = jax.lax.scan(step, state, (jnp.arange(count), parts))
        hidden = read.hidden.swapaxes(0, 1).reshape(padded.shape)[:, : x.shape[1]]
        sums = (read.tokens, read.x_active, read.y_active)
        return Activations(hidden, *(leaf.sum(axis=0) for leaf in sums)), state

    def _chunk(
        self,
        x: jax.Array,
        length: jax.Array,
        state: State | None,
        key: jax.Array | None,
        fresh: bool = False,
    ) -> tuple[Activations, State | None]:
        """Read one chunk of each row after what a state holds.

        Args:
            x: Vectors `[B, C, d]`, padded on the right.
            length: Number of real vectors in each row, `[B]` int32.
            state: State before the chunk; None for rows that begin here and end here.
            key: Key of dropout; None for none.
            fresh: Static promise that the state is empty, so that it is only written.
        """
        config = self.config
        batch, size = x.shape[:2]
        start = jnp.zeros_like(length) if state is None else state.length
        offset = jnp.arange(size)
        real = offset < length[:, None]
        turns = _turns(start[:, None] + offset, self.frequency[...])
        released = config.form == "released"
        carried = (
            None
            if released
            else jnp.zeros((batch, size, config.num_heads, config.head_neurons), x.dtype)
        )
        value = _norm(x) if released else x

        def layer(carry: Any, inputs: tuple[jax.Array, Any]) -> tuple[Any, Any]:
            index, synapses = inputs
            value, carried = carry
            x = jax.nn.relu(self._neurons(value))
            if not released:
                x = carried + x
            rotated = jnp.where(real[..., None, None], _rotate(x, turns), 0)
            read, synapses = self._attend(rotated, value, synapses, length, fresh)
            gate = jnp.einsum("bthd,dhn->bthn", _norm(read), self._cast(self.dy))
            y = jax.nn.relu(gate) * x
            active = [
                ((neurons > 0) & real[..., None, None]).sum(dtype=jnp.float32) for neurons in (x, y)
            ]
            if key is not None and config.dropout:
                kept = jax.random.bernoulli(
                    jax.random.fold_in(key, index), 1 - config.dropout, y.shape
                )
                y = jnp.where(kept, y / (1 - config.dropout), 0)
            out = _norm(self._project(y))
            value = self.constrain(_norm(value + out) if released else out)
            return (value, carried if released else x), (*active, synapses)

        if config.remat == "full":
            layer = jax.checkpoint(layer, prevent_cse=False)
        before = None if state is None else state.synapses
        layers = jnp.arange(config.num_layers)
        (hidden, _), (x_active, y_active, after) = jax.lax.scan(
            layer, (self.constrain(value), carried), (layers, before)
        )
        read = Activations(hidden, real.sum(dtype=jnp.float32), x_active, y_active)
        return read, None if state is None else State(state.length + length, after)

    def _attend(
        self,
        rotated: jax.Array,
        value: jax.Array,
        synapses: jax.Array | None,
        length: jax.Array,
        fresh: bool,
    ) -> tuple[jax.Array, jax.Array | None]:
        """What each token reads of those before it, `[B, C, H, d]`, and the synapses after it.

        Args:
            rotated: Rotated neurons `[B, C, H, N]`, 0 in padding.
            value: Vectors `[B, C, d]` that are read.
            synapses: State before the chunk, `[B, H, N, d]` float32.
            length: Number of real tokens of the chunk in each row, `[B]` int32.
            fresh: Static promise that `synapses` are 0.
        """
        size = value.shape[1]
        offset = jnp.arange(size)
        # Strictly the past: a token reads before it writes.
        past = (offset[:, None] > offset).astype(jnp.float32)
        decay = damping(self.config)
        if decay is not None:
            distance = jnp.maximum(offset[:, None] - offset, 0)
            past = past * decay[:, None, None] ** distance
        scores = jnp.einsum("bthn,bshn->bhts", rotated, rotated, preferred_element_type=jnp.float32)
        read = jnp.einsum("bhts,bsd->bthd", (scores * past).astype(value.dtype), value)
        if synapses is None:
            return read, None
        query, wide = rotated.astype(jnp.float32), value.astype(jnp.float32)
        if not fresh:
            before = jnp.einsum("bthn,bhnd->bthd", query, synapses)
            if decay is not None:
                before = before * decay[:, None] ** offset[:, None, None]
            read = read + before.astype(value.dtype)
        if decay is not None:
            left = jnp.maximum(length[:, None] - offset, 0)
            query = query * (decay[:, None] ** left[..., None, None])
            synapses = synapses * (decay ** length[:, None])[..., None, None]
        return read, synapses + jnp.einsum("bthn,btd->bhnd", query, wide)

    def _neurons(self, value: jax.Array) -> jax.Array:
        """Dx: vectors `[B, C, d]` to neurons `[B, C, H, N]`."""
        neurons = jnp.einsum("btd,dhn->bthn", value, self._cast(self.dx))
        if self.adapters is not None and "dx" in self.adapters:
            neurons = neurons + self.adapters["dx"](value).reshape(neurons.shape)
        return neurons

    def _project(self, y: jax.Array) -> jax.Array:
        """E: neurons `[B, C, H, N]` to vectors `[B, C, d]`."""
        vectors = jnp.einsum("bthn,hnd->btd", y, self._cast(self.e))
        if self.adapters is not None and "e" in self.adapters:
            vectors = vectors + self.adapters["e"](y.reshape(*y.shape[:2], -1))
        return vectors

    def _cast(self, param: nnx.Param) -> jax.Array:
        return param[...].astype(self.config.dtype)


def frequencies(neurons: int, base: float) -> jax.Array:
    """Rotary frequencies `[N]` of a head in turns per token; a pair of neurons shares one."""
    pair = np.arange(neurons) // 2
    return jnp.asarray(base ** (-2 * pair / neurons) / (2 * np.pi), jnp.float32)


def damping(config: HatchlingConfig) -> jax.Array | None:
    """Factor `[H]` by which each head's memory decays per token, of ALiBi's slopes; or None."""
    if not config.damping:
        return None
    slope = 2.0 ** (-8 * np.arange(1, config.num_heads + 1) / config.num_heads)
    return jnp.asarray(np.exp(-slope), jnp.float32)


def _turns(position: jax.Array, frequency: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine `[B, C, H, N]` float32 of positions `[B, C]`; phases are taken modulo 1."""
    phase = (position.astype(jnp.float32)[..., None, None] * frequency) % 1.0
    return jnp.cos(2 * jnp.pi * phase), jnp.sin(2 * jnp.pi * phase)


def _rotate(x: jax.Array, turns: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Pairs of neighbours in `x [B, C, H, N]` turned by their phases."""
    cos, sin = turns
    even, odd = x[..., ::2], x[..., 1::2]
    turned = jnp.stack([-odd, even], axis=-1).reshape(x.shape)
    return (x * cos + turned * sin).astype(x.dtype)


def _norm(x: jax.Array) -> jax.Array:
    """LayerNorm over the last axis, without scale and bias."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + NORM_EPS)).astype(x.dtype)


def _hidden_of(output: Activations | jax.Array) -> jax.Array:
    return output.hidden if isinstance(output, Activations) else output


def _identity(x: jax.Array) -> jax.Array:
    return x
