"""Dragon Hatchling: one layer of neurons, applied repeatedly, with a state of earlier tokens.

Parallel, chunked and recurrent computation are one function, `Hatchling._chunk`: the tokens of a
chunk attend to each other by a matrix of scores, and to all earlier tokens by the state.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype, Initializer

from thoughtbubbles.architecture import Constrain
from thoughtbubbles.checks import (
    check_config,
    check_floating,
    check_ids,
    check_integers,
    check_sizes,
    check_vectors,
    checked_lengths,
)
from thoughtbubbles.hatchling import lora
from thoughtbubbles.hatchling.attention import (
    Reach,
    attend,
    by_head,
    frequencies,
    normalized,
    rotate,
    turns_of,
)
from thoughtbubbles.hatchling.config import HatchlingConfig
from thoughtbubbles.hatchling.sites import SitedHatchling, hidden_of
from thoughtbubbles.hatchling.state import Activations, Frequency, Layers, Neurons, State
from thoughtbubbles.hatchling.truncation import truncated_sum
from thoughtbubbles.head import head_logits
from thoughtbubbles.placement import AnyArray, broadcast_beside, embedding_rows, zeros_beside
from thoughtbubbles.rows import next_tokens, padded_in_front, real_ids
from thoughtbubbles.streams import Streams
from thoughtbubbles.weights import named, weight


class Hatchling(SitedHatchling):
    """A Dragon Hatchling (BDH, arXiv 2509.26507), in the released form or the paper's form.

    Args:
        config: Sizes and options of the model.
        rngs: PRNG keys to initialise the parameters.
        constrain: Function applied to every residual array `[B, T, d]` between layers.
        attend: Not used, because attention is linear.
        kernel_init: Initializer of Dx, Dy, E and the LM head, called with shape
            `(inputs, outputs)`; by default normal with standard deviation 0.02.
        param_dtype: Dtype of the parameters; the config's `dtype` is used in the computation.

    Raises:
        ValueError: The config is not a `HatchlingConfig`.
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
        kernel_init: Initializer | None = None,
        param_dtype: Dtype = jnp.float32,
    ):
        check_config(config, self.config_class)
        check_floating("param_dtype", param_dtype)
        self.config, self.constrain = config, constrain or _identity
        width, heads, neurons = config.embed_dim, config.num_heads, config.head_neurons
        into, out_of = ("embed", "heads", "head_dim"), ("heads", "head_dim", "embed")
        table, kernel = (
            partial(weight, rngs, init=init, dtype=param_dtype) for init in (None, kernel_init)
        )
        self.embed = table((config.vocab_size, width), ("vocab", "embed"))
        self.dx = kernel((width, heads, neurons), into)
        self.dy = kernel((width, heads, neurons), into)
        self.e = kernel((heads, neurons, width), out_of, inputs=2)
        self.head = kernel((width, config.vocab_size), ("embed", "vocab"))
        turns = jnp.tile(frequencies(neurons, config.rope_base), (heads, 1))
        self.frequency = named(Frequency, turns, ("heads", "head_dim"))
        self.adapters = nnx.data(None)

    def embed_tokens(self, tokens: AnyArray) -> jax.Array:
        """Embed token ids `[...]` as vectors `[..., d]`, NaN for an id outside the vocabulary."""
        check_integers(tokens)
        return embedding_rows(self.embed[...], tokens).astype(self.config.dtype)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Compute logits `[..., V]` float32 from hidden states `[..., d]`."""
        return head_logits(hidden, self.head[...].astype(hidden.dtype), vocab_axis=1)

    def hidden_states(
        self,
        x: jax.Array,
        length: AnyArray | None = None,
        *,
        positions: jax.Array | None = None,
        visible: jax.Array | None = None,
        starts: jax.Array | None = None,
    ) -> jax.Array:
        """Compute hidden states `[B, T, d]` from input vectors.

        Args:
            x: Input vectors `[B, T, d]`, padded on the right.
            length: Number of real vectors in each row, `[B]` int32; all `T` by default.
            positions: Position of each vector, `[B, T]` int32, with `visible`; `length` is ignored.
            visible: Attention mask `[B, T, T]` bool: whether a vector (axis 1) attends to another
                (axis 2). No vector attends to itself.
            starts: Whether a document begins at each vector, `[B, T]` bool; None if none begins.

        Raises:
            ValueError: Only one of `positions` and `visible` is given, or `starts` with them.
        """
        check_vectors(x, self.config.embed_dim, "a Hatchling")
        x = x.astype(self.config.dtype)
        if positions is None and visible is None:
            return self._forward(x, length, starts=starts).hidden
        if positions is None or visible is None or starts is not None:
            raise ValueError("positions and visible belong together, without starts: give both")
        reach = Reach.from_mask(self.config, positions, visible)
        return self._layers(self._first(x), reach, None)[0].value

    @property
    def takes_positions(self) -> bool:
        return True

    def run(
        self,
        tokens: AnyArray,
        length: AnyArray | None = None,
        *,
        track: bool = False,
        key: jax.Array | None = None,
    ) -> Activations:
        """Compute the hidden states of tokens; a PRNG `key` enables dropout."""
        check_ids(tokens)
        tokens = real_ids(tokens, length)
        return self._forward(self.embed_tokens(tokens), length, key, self._starts(tokens))

    def loss(
        self, rows: AnyArray, *, track: bool = False, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """As `Architecture.loss`; with `truncate`, no gradient flows between segments."""
        size = self.config.truncate
        if size is None or rows.shape[1] - 1 <= size:
            return super().loss(rows, track=track, key=key)
        count = -(-(rows.shape[1] - 1) // size)
        more = ((0, 0), (0, count * size + 1 - rows.shape[1]))
        whole = next_tokens(rows)
        parts = [
            jnp.pad(values, more, constant_values=-1).reshape(-1, count, size).swapaxes(0, 1)
            for values in whole
        ]

        def segment(model: "Hatchling", state: State, inputs: Any) -> Any:
            index, tokens, targets = inputs
            length = (tokens >= 0).sum(axis=1, dtype=jnp.int32)
            own = None if key is None else jax.random.fold_in(key, index)
            tokens = jnp.maximum(tokens, 0)
            x, starts = model.embed_tokens(tokens), model._starts(tokens)
            output, state = model._chunks(x, length, state, own, starts=starts)
            log_prob = model.log_prob(output, jnp.maximum(targets, 0))
            return -jnp.where(targets >= 0, log_prob, 0).sum(), (state, model.statistics(output))

        state = self.init_cache(rows.shape[0], rows.shape[1]).beside(rows)
        nats, sums = truncated_sum(segment, self, state, (jnp.arange(count), *parts))
        nats += jnp.where(padded_in_front(*whole), jnp.nan, 0).sum()
        return nats, (rows[:, 1:] >= 0).sum(dtype=jnp.float32), sums

    @property
    def loss_by_token(self) -> bool:
        return type(self).loss is Hatchling.loss and self.config.truncate is None

    def logits(self, output: Activations | Streams | jax.Array) -> jax.Array:
        return self.unembed(hidden_of(output))

    def logits_at(self, output: Activations | Streams | jax.Array, position: AnyArray) -> jax.Array:
        return super().logits_at(hidden_of(output), position)

    def init_cache(self, batch: int, max_tokens: int) -> State:
        """Return the state of `batch` empty rows; rows have no limit, so `max_tokens` is unused."""
        check_sizes(batch=batch)
        config = self.config
        shape = (config.num_layers, batch, config.num_heads, config.head_neurons, config.embed_dim)
        return State(jnp.zeros((batch,), jnp.int32), jnp.zeros(shape))

    def cache_batch_axes(self, cache: State) -> State:
        """Return a `State` with the index of the batch axis in place of each array of the cache."""
        return State(0, 1)  # pyright: ignore[reportArgumentType]

    def advance(
        self, cache: State, tokens: AnyArray, length: AnyArray, *, fresh: bool = False
    ) -> tuple[jax.Array, State]:
        tokens = real_ids(tokens, length)
        x, starts = self.embed_tokens(tokens), self._starts(tokens)
        return self.extend(cache, x, length, fresh=fresh, starts=starts)

    def extend(
        self,
        cache: State,
        x: jax.Array,
        length: AnyArray,
        *,
        fresh: bool = False,
        starts: jax.Array | None = None,
    ) -> tuple[jax.Array, State]:
        """Append vectors to rows; return their hidden states `[B, C, d]` and the new state.

        Args:
            cache: State that `init_cache` or `extend` returned; it is not donated.
            x: `C` vectors for each row, `[B, C, d]`, padded on the right.
            length: Number of real vectors in each row, `[B]` int32; 0 leaves a row unchanged, and a
                number below 0 or above C makes the row NaN.
            fresh: Static promise that the cache is empty.
            starts: Whether a document, which empties the state, begins at each vector, `[B, C]`.
        """
        check_vectors(x, self.config.embed_dim, "a Hatchling")
        State.check(cache, x, length)
        if not x.shape[1]:
            return x.astype(self.config.dtype), cache
        length, cache = broadcast_beside(length, x, 1), cache.beside(x)
        # An impossible length puts NaN into the state, so the row stays NaN in later calls.
        wrong = (length > x.shape[1]) | (length < 0)
        length = jnp.where(wrong, x.shape[1], length)
        x = jnp.where(wrong[:, None, None], jnp.nan, x.astype(self.config.dtype))
        read, cache = self._chunks(x, length, cache, None, fresh, starts)
        return read.hidden, cache

    @property
    def lora_targets(self) -> Mapping[str, tuple[tuple[int, ...], int, int]]:
        """Sizes of the linear layers `dx` (vectors to neurons) and `e` (neurons to vectors)."""
        return lora.lora_targets(self.config)

    @property
    def lora_axes(self) -> Mapping[str, tuple[tuple[str, ...], str, str]]:
        return lora.AXES

    def apply_lora(self, adapter: Mapping[str, Any]) -> "Hatchling":
        """Return a copy with LoRA adapters on Dx and E; the copy shares the model's arrays."""
        return lora.with_adapter(self, adapter)

    def merge_lora(self, deltas: Mapping[str, jax.Array]) -> "Hatchling":
        """Return a copy with `deltas` added to the kernels of Dx and E (`lora.merged`)."""
        return lora.merged(self, deltas)

    def statistics(self, output: Activations) -> dict[str, jax.Array]:
        """Count real `tokens` of a batch, and active neurons `x [L]`, `y [L]` in its `L` layers."""
        return {"tokens": output.tokens, "x": output.x_active, "y": output.y_active}

    @classmethod
    def step_metrics(cls, config: HatchlingConfig, sums: Mapping[str, Any]) -> dict[str, Any]:
        """Fraction of active neurons in each layer, before the gate (`x`) and after it (`y`)."""
        if "x" not in sums:
            return {}
        neurons = max(float(sums["tokens"]), 1.0) * config.num_neurons
        return {
            f"layer_{layer}/{name}_active": float(np.asarray(sums[name])[layer]) / neurons
            for layer in range(config.num_layers)
            for name in ("x", "y")
        }

    def _starts(self, tokens: AnyArray) -> jax.Array | None:
        """Whether each token begins a document; None if the config has no `separator`."""
        separator = self.config.separator
        return None if separator is None else jnp.asarray(tokens) == separator

    def _forward(
        self,
        x: jax.Array,
        length: AnyArray | None,
        key: jax.Array | None = None,
        starts: jax.Array | None = None,
    ) -> Activations:
        length = checked_lengths(length, x)
        if self.config.chunk is None or x.shape[1] <= self.config.chunk:
            return self._chunk(x, length, None, key, starts=starts)[0]
        state = self.init_cache(x.shape[0], x.shape[1]).beside(x)
        return self._chunks(x, length, state, key, starts=starts)[0]

    def _chunks(
        self,
        x: jax.Array,
        length: jax.Array,
        state: State,
        key: jax.Array | None,
        fresh: bool = False,
        starts: jax.Array | None = None,
    ) -> tuple[Activations, State]:
        """Process rows of any length chunk by chunk; the state passes from chunk to chunk."""
        size = x.shape[1] if self.config.chunk is None else min(self.config.chunk, x.shape[1])
        count = -(-x.shape[1] // size)
        if count == 1:
            read, new = self._chunk(x, length, state, key, fresh, starts)
            assert new is not None
            return read, new

        def parts(values: jax.Array) -> jax.Array:
            """Split values `[B, T, ...]` into chunks, `[chunks, B, C, ...]`."""
            more = [(0, 0), (0, count * size - values.shape[1])] + [(0, 0)] * (values.ndim - 2)
            padded = jnp.pad(values, more)
            return padded.reshape(len(values), count, size, *values.shape[2:]).swapaxes(0, 1)

        def step(state: State, inputs: Any) -> tuple[Any, Activations]:
            index, part, starts = inputs
            here = jnp.clip(length - index * size, 0, size)
            own = None if key is None else jax.random.fold_in(key, index)
            read, state = self._chunk(part, here, state, own, starts=starts)  # pyright: ignore
            return state, read

        inputs = jnp.arange(count), parts(x), None if starts is None else parts(starts)
        state, read = jax.lax.scan(step, state, inputs)
        hidden = read.hidden.swapaxes(0, 1).reshape(x.shape[0], -1, x.shape[2])[:, : x.shape[1]]
        sums = (read.tokens, read.x_active, read.y_active)
        return Activations(hidden, *(leaf.sum(axis=0) for leaf in sums)), state

    def _chunk(
        self,
        x: jax.Array,
        length: jax.Array,
        state: State | None,
        key: jax.Array | None,
        fresh: bool = False,
        starts: jax.Array | None = None,
    ) -> tuple[Activations, State | None]:
        """Process one chunk of each row, which follows the tokens of the state.

        Args:
            x: Vectors `[B, C, d]`, padded on the right.
            length: Number of real vectors in each row, `[B]` int32.
            state: State before the chunk; None if the chunk is the whole row.
            key: PRNG key of dropout; None for no dropout.
            fresh: Static promise that the state is empty, so that nothing attends to it.
            starts: Whether a document begins at each vector, `[B, C]` bool.
        """
        first = jnp.zeros_like(length) if state is None else state.length
        reach = Reach.of(self.config, first, length, x.shape[1], starts)
        if state is None or fresh:
            position = jnp.arange(x.shape[1])[None] if starts is None else reach.position
            reach = dataclasses.replace(reach, position=position, bound=x.shape[1])
        before = None if state is None else state.synapses
        read, after = self._layers(self._first(x), reach, before, key, fresh)
        tokens = reach.real.sum(dtype=jnp.float32)
        output = Activations(read.value, tokens, read.x_active, read.y_active)
        return output, None if after is None else State(reach.end, after)

    def _first(self, x: jax.Array) -> jax.Array:
        """Prepare embedded vectors for the first layer: LayerNorm in the released form."""
        return normalized(x) if self.config.form == "released" else x

    def _layers(
        self,
        value: jax.Array,
        reach: Reach,
        synapses: jax.Array | None,
        key: jax.Array | None = None,
        fresh: bool = False,
        watch: bool = False,
        layers: tuple[int, int] | None = None,
        write_scale: jax.Array | None = None,
        carried: jax.Array | None = None,
    ) -> tuple[Layers, jax.Array | None]:
        """Apply layers to the vectors of a chunk; return the result and the synapses after it.

        Args:
            value: Vectors `[B, C, d]`.
            reach: Positions, mask and decay of the vectors.
            synapses: Synapses before the chunk, `[L, B, H, N, d]` float32, or None.
            key: PRNG key of dropout; None for no dropout.
            fresh: Static promise that the synapses are 0.
            watch: Whether the result includes the neurons of each layer.
            layers: Index of the first layer, and index after the last layer; None for all layers.
            write_scale: Factor on each vector's residual update, `[B, C]`; None for 1.
            carried: In the paper's form, neurons after the previous layer; None for 0.
        """
        config = self.config
        rematerialized = config.remat == "full"
        turns = None if rematerialized else turns_of(reach, self.frequency[...])
        real = reach.real[..., None]
        released = config.form == "released"
        if carried is None and not released:
            shape = (*value.shape[:2], config.num_heads, config.head_neurons)
            carried = jnp.moveaxis(zeros_beside(value, shape, value.dtype), 2, 0)

        def layer(carry: Any, inputs: tuple[jax.Array, Any]) -> tuple[Any, Any]:
            index, synapses = inputs
            value, carried = carry
            x = jax.nn.relu(self._neurons(value))
            if not released:
                x = carried + x
            # The tables have n entries per token, so a rematerialized layer does not store them.
            here = turns_of(reach, self.frequency[...]) if turns is None else turns
            rotated = jnp.where(real, rotate(x, here), 0)
            read, synapses = attend(rotated, value, reach, synapses, fresh)
            y = jax.nn.relu(by_head(normalized(read), self._cast(self.dy))) * x
            active = [((neurons > 0) & real).sum(dtype=jnp.float32) for neurons in (x, y)]
            watched = None
            if watch:
                shown = (jnp.moveaxis(jnp.where(real, leaf, 0), 0, 2) for leaf in (x, y))
                watched = Neurons(*shown, value=jnp.where(real, value, 0))
            if key is not None and config.dropout:
                own = jax.random.fold_in(key, index)
                kept = jax.random.bernoulli(own, 1 - config.dropout, y.shape)
                y = jnp.where(kept, y / (1 - config.dropout), 0)
            out = normalized(self._project(y))
            if write_scale is not None:
                out = out * write_scale[..., None].astype(out.dtype)
            value = self.constrain(normalized(value + out) if released else out)
            return (value, carried if released else x), (*active, watched, synapses)

        if rematerialized:
            layer = jax.checkpoint(layer, prevent_cse=False)
        numbers = jnp.arange(*(layers or (0, config.num_layers)))
        (value, carried), (x_active, y_active, watched, after) = jax.lax.scan(
            layer, (self.constrain(value), carried), (numbers, synapses)
        )
        return Layers(value, x_active, y_active, watched, carried), after

    def _neurons(self, value: jax.Array) -> jax.Array:
        """Apply Dx: vectors `[B, C, d]` to neurons `[H, B, C, N]`, before the ReLU."""
        each = jnp.broadcast_to(value, (self.config.num_heads, *value.shape))
        return lora.adapted_neurons(by_head(each, self._cast(self.dx)), value, self.adapters)

    def _project(self, y: jax.Array) -> jax.Array:
        """Apply E: neurons `[H, B, C, N]` to vectors `[B, C, d]`."""
        vectors = jnp.einsum("hbtn,hnd->btd", y, self._cast(self.e))
        return lora.adapted_vectors(vectors, y, self.adapters)

    def _cast(self, param: nnx.Param) -> jax.Array:
        return param[...].astype(self.config.dtype)


def _identity(x: jax.Array) -> jax.Array:
    return x
