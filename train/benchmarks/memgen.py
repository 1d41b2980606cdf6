"""Benchmark weaving in generation and training, and extending caches against re-prefilling."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memgen import (
    AlwaysInvoke,
    MemGen,
    MemGenConfig,
    NeverInvoke,
    Plan,
    WeaverConfig,
    WeaverParam,
    begin,
    make_request,
    respond,
    sft_loss,
    token_log_probs,
)
from memgen.events import WeaverBatchSize
from memgen.request import row_keys
from memgen.session import put, take
from thoughtbubbles import Backbone, Thoughtbubbles
from train.benchmarks.models import ModelSizes, random_tokens
from train.benchmarks.timing import Clock, Cost, interleaved, timed


@dataclasses.dataclass(frozen=True)
class MemGenBenchmark(ModelSizes):
    """Benchmark of MemGen with random parameters, sampled tokens and random ids as boundaries.

    Attributes:
        num_kv_heads: Number of key/value heads of a block.
        vocab_size: Number of token ids.
        latents: Number of latents of a weaving event.
        weave: Fraction of token ids that are boundaries, after which memory is woven.
        batches: Batch sizes of generation, in rows; one line is printed for each size.
        prompt: Number of tokens per prompt.
        new_tokens: Number of tokens that are generated in each row.
        sft_batch: Number of rows of a training step.
        sft_tokens: Number of tokens of a training row.
        sft_events: Number of weaving events of a training row.
        repeats: Number of rounds of each measurement; the smallest time is reported.
    """

    num_kv_heads: int = 2
    vocab_size: int = 1024
    latents: int = 8
    weave: float = 0.05
    batches: tuple[int, ...] = (1, 8, 32)
    prompt: int = 64
    new_tokens: int = 128
    sft_batch: int = 4
    sft_tokens: int = 256
    sft_events: int = 6
    repeats: int = 3

    def __post_init__(self):
        if min(self.repeats, self.new_tokens, self.prompt, self.sft_events, *self.batches) < 1:
            raise ValueError("repeats, new_tokens, prompt, sft_events and batches: 1 or more")
        if not 0 <= self.weave <= 1:
            raise ValueError(f"weave={self.weave} is not a share: choose from 0 to 1")


class Reprefilled(nnx.Module):
    """Decoder wrapper that re-prefills a row at each chunk of latents, as published code does.

    A weaver re-prefills its whole context at each event. Only the filled part of the capacity is
    computed, rounded up to a quarter of the capacity. Published code re-prefills all rows of a
    batch if one row weaves; here, the decoding loop decides how many rows are computed.

    Args:
        decoder: Decoder to wrap, a `memgen.DecoderBackbone`.
        slots: Number of latents of an event; a chunk of this many vectors causes a re-prefill.
        weaves: Whether the decoder belongs to a weaver, which keeps no cache of keys and values.
    """

    def __init__(self, decoder: Any, slots: int, weaves: bool = False):
        self.decoder, self.slots, self.weaves = nnx.data(decoder), slots, weaves

    @property
    def embed_dim(self) -> int:
        return self.decoder.embed_dim

    @property
    def vocab_size(self) -> int:
        return self.decoder.vocab_size

    @property
    def lora_targets(self):
        return self.decoder.lora_targets

    def apply_lora(self, adapter):
        return Reprefilled(self.decoder.apply_lora(adapter), self.slots, weaves=True)

    def for_decoding(self):
        return Reprefilled(self.decoder.for_decoding(), self.slots, self.weaves)

    def embed_tokens(self, tokens):
        return self.decoder.embed_tokens(tokens)

    def hidden_states(self, x, length=None, *, positions=None, visible=None):
        return self.decoder.hidden_states(x, length, positions=positions, visible=visible)

    def unembed(self, hidden):
        return self.decoder.unembed(hidden)

    def init_cache(self, batch: int, max_len: int):
        rows = jnp.zeros((batch, max_len, self.embed_dim))
        cache = None if self.weaves else self.decoder.init_cache(batch, max_len)
        return rows, jnp.zeros((batch,), jnp.int32), cache

    def extend(self, cache, x, length, *, fresh=False):
        rows, before, inner = cache
        rows, after = put(rows, x, before, length), before + length
        if not fresh and x.shape[1] != self.slots:
            if self.weaves:  # rows are kept until the queries come
                return jnp.zeros_like(x), (rows, after, None)
            hidden, inner = self.decoder.extend(inner, x, length)
            return hidden, (rows, after, inner)
        capacity = rows.shape[1]
        spans = [-(-capacity * part // 4) for part in (1, 2, 3, 4)]
        chosen = jnp.searchsorted(jnp.array(spans), after.max())

        def prefill_of(span: int) -> Callable:
            padding = (0, 0), (0, capacity - span), (0, 0)

            def prefill(rows):
                some = rows[:, :span]
                if self.weaves:
                    return jnp.pad(self.decoder.hidden_states(some, after), padding), None
                empty = self.decoder.init_cache(rows.shape[0], capacity)
                hidden, new = self.decoder.extend(empty, some, after, fresh=True)
                return jnp.pad(hidden, padding), new

            return prefill

        hidden, inner = jax.lax.switch(chosen, [prefill_of(span) for span in spans], rows)
        return take(hidden, before[:, None] + jnp.arange(x.shape[1])), (rows, after, inner)


def main(config: MemGenBenchmark) -> None:
    """Print tokens per second of generation, and times of training steps, with and without weaving.

    Generation with weaving is also timed with re-prefills in place of cache extension.
    """
    print(
        f"d={config.embed_dim}, {config.num_layers} layers, {config.latents} latents an event, "
        f"prompts of {config.prompt}, {config.new_tokens} new tokens; tokens/s"
    )
    print("batch  plain loop  weaving  events/token  rows that weave re-prefilled  all rows | "
          "slower than plain  re-prefill slower  of all rows")  # fmt: skip
    for batch in config.batches:
        runs = {
            "plain": Generation(config, batch, NeverInvoke()),
            "weaving": Generation(config, batch, AlwaysInvoke()),
            "re-prefill": Generation(config, batch, AlwaysInvoke(), re_prefill="some"),
            "all rows": Generation(config, batch, AlwaysInvoke(), re_prefill="all"),
        }
        timing = interleaved(runs, config.repeats)
        best = {name: found.best.seconds for name, found in timing.items()}
        tokens = batch * config.new_tokens
        print(
            f"{batch:5} {tokens / best['plain']:11.0f} {tokens / best['weaving']:8.0f} "
            f"{runs['weaving'].events / tokens:13.3f} {tokens / best['re-prefill']:29.0f} "
            f"{tokens / best['all rows']:9.0f} | "
            f"{best['weaving'] / best['plain']:17.2f} {best['re-prefill'] / best['weaving']:18.2f} "
            f"{best['all rows'] / best['weaving']:12.2f}",
            flush=True,
        )
    runs = {
        "two passes": training_step(config, None),
        "exact": training_step(config, latents_see_latents=True),
        "one pass": training_step(config, latents_see_latents=False),
    }
    timing = interleaved(runs, config.repeats)
    best = {name: found.best.seconds for name, found in timing.items()}
    print(
        f"SFT step, batch {config.sft_batch}, {config.sft_tokens} tokens, {config.sft_events} "
        "events, forward and backward; ms (times one weaver and one reasoner pass)"
    )
    for name, seconds in best.items():
        print(f"{name:10} {1e3 * seconds:8.1f} ({seconds / best['two passes']:.2f})")


def build(config: MemGenBenchmark, events: int, latents_see_latents: bool = True) -> MemGen:
    """Make a `MemGen` with random parameters.

    Args:
        config: Options of the benchmark.
        events: Maximum number of events per row, besides the event at the end of the prompt.
        latents_see_latents: Option `latents_see_latents` of `WeaverConfig`.
    """
    model = config.model_config(config.vocab_size, num_kv_heads=config.num_kv_heads)
    weaver = WeaverConfig(config.latents, config.latents, latents_see_latents=latents_see_latents)
    rng = np.random.default_rng(0)
    boundary = (rng.random(config.vocab_size) < config.weave).astype(np.uint8)
    return jax.jit(
        lambda: MemGen(
            Backbone(Thoughtbubbles(model, rngs=nnx.Rngs(0))),
            MemGenConfig(weaver, max_inference_events=events),
            boundary=boundary,
            rngs=nnx.Rngs(1),
        )
    )()


class Generation:
    """Timed generation of responses to a batch of prompts, without the prefill of the prompts.

    Args:
        config: Options of the benchmark.
        batch: Number of rows.
        policy: Trigger policy, `NeverInvoke()` or `AlwaysInvoke()`.
        re_prefill: Rows that are re-prefilled from their beginning at an event: "some" for the rows
            that weave, "all" for the whole batch as in published code, or None for no row.
    """

    def __init__(
        self,
        config: MemGenBenchmark,
        batch: int,
        policy: Any,
        re_prefill: Literal["some", "all"] | None = None,
    ):
        self._config, self._batch, self._all_rows = config, batch, re_prefill == "all"
        # Twice the expected number; 0 where nothing is woven, so that caches are no larger.
        never = isinstance(policy, NeverInvoke)
        events = 0 if never else 2 * round(config.weave * config.new_tokens)
        self._memgen = build(config, events)
        if re_prefill:
            reasoner = Reprefilled(self._memgen.reasoner, config.latents)
            self._memgen = self._memgen.with_reasoner(reasoner)
        self._request = make_request(self._memgen, config.new_tokens, policy, temperature=1.0)
        self.events = 0

    def __call__(self) -> Cost:
        config = self._config
        tokens = random_tokens(config.vocab_size, self._batch, config.prompt)
        length = jnp.full((self._batch,), config.prompt, jnp.int32)
        keys = row_keys(0, [row.tolist() for row in tokens])
        capacity = config.prompt + config.new_tokens
        session = begin(self._memgen, jnp.asarray(tokens), length, keys, capacity)
        jax.block_until_ready(session)
        clock = Clock()
        # As many shards as rows: if one of them weaves, all do.
        weaver_batch_size = WeaverBatchSize(shards=self._batch) if self._all_rows else None
        response, _ = respond(
            self._memgen, session, self._request, config.new_tokens, weaver_batch_size
        )
        jax.block_until_ready(response)
        cost = clock.read()
        self.events = int((np.asarray(response.points) >= 0).sum())
        return cost


def training_step(config: MemGenBenchmark, latents_see_latents: bool | None) -> Callable[[], Cost]:
    """Return a function that computes the loss and the weaver's gradients, and returns their cost.

    Args:
        config: Options of the benchmark.
        latents_see_latents: Option of `WeaverConfig`. None selects the baseline: one forward pass
            of the weaver and one of the reasoner, over rows of tokens that are as long as rows with
            latents.
    """
    events, length = config.sft_events, config.sft_tokens
    memgen = build(config, events - 1, latents_see_latents is not False)
    whole = length + events * config.latents
    shape = (config.sft_batch, whole if latents_see_latents is None else length)
    tokens = jnp.asarray(random_tokens(config.vocab_size, *shape))
    position = jnp.arange(shape[1])
    loss_mask = jnp.broadcast_to((position >= length // 2) & (position < length), shape)
    point = length // 2 + jnp.arange(events) * (length // 2 // events)
    point = jnp.broadcast_to(point, (shape[0], events)).astype(jnp.int32)
    kind = jnp.broadcast_to(jnp.arange(events) > 0, point.shape).astype(jnp.int32)
    plan = Plan.of(point, kind, memgen.config)
    graphdef, params, rest = nnx.split(memgen, WeaverParam, ...)

    @jax.jit
    def gradients(params, rest):
        def loss(params):
            memgen = nnx.merge(graphdef, params, rest)
            if latents_see_latents is not None:
                return sft_loss(memgen, tokens, loss_mask, plan)[0]
            vectors = memgen.reasoner.embed_tokens(tokens)
            woven = memgen.weaving().hidden_states(memgen.weaver.context(vectors))
            hidden = memgen.reasoner.hidden_states(vectors + memgen.weaver.memory(woven))
            return -token_log_probs(memgen.reasoner, hidden, tokens, loss_mask).sum()

        return jax.value_and_grad(loss)(params)

    return partial(timed, gradients, params, rest)
