"""What weaving costs: in generation and in a training step, beside what it could cost."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

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
from memgen.request import row_keys
from memgen.session import put, take
from thoughtbubbles import Backbone, ModelConfig, Thoughtbubbles


@dataclasses.dataclass(frozen=True)
class MemGenBenchmark:
    """Random weights; tokens are sampled, and a share of all ids are boundaries.

    Attributes:
        weave: share of tokens after which memory is woven.
        batches: rows of each generation.
        sft_events: events of each training row.
        repeats: of each measurement, interleaved; the smallest time counts.
    """

    embed_dim: int = 256
    num_layers: int = 6
    num_heads: int = 4
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


class FromScratch(nnx.Module):
    """What published code does: a chunk of latents drops the cache, and its row is read again.

    A weaver reads its whole context again at each event. As there, only what has been written is
    read: the span is rounded up to a quarter of the room. There all rows of a batch are read again
    if one weaves; here, as in the loop beside it, those that weave.

    Args:
        decoder: the real one.
        weaves: whether it is a weaver's, which is only ever read whole.
        slots: vectors of a chunk that makes it read everything again.
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
        return FromScratch(self.decoder.apply_lora(adapter), self.slots, weaves=True)

    def for_decoding(self):
        return FromScratch(self.decoder.for_decoding(), self.slots, self.weaves)

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
            if self.weaves:  # kept until the queries come
                return jnp.zeros_like(x), (rows, after, None)
            hidden, inner = self.decoder.extend(inner, x, length)
            return hidden, (rows, after, inner)
        room = rows.shape[1]
        spans = [-(-room * part // 4) for part in (1, 2, 3, 4)]
        chosen = jnp.searchsorted(jnp.array(spans), after.max())

        def again(span: int) -> Callable:
            def read(rows):
                some = rows[:, :span]
                if self.weaves:
                    return jnp.pad(
                        self.decoder.hidden_states(some, after), self._rest(span, room)
                    ), None
                empty = self.decoder.init_cache(rows.shape[0], room)
                hidden, new = self.decoder.extend(empty, some, after, fresh=True)
                return jnp.pad(hidden, self._rest(span, room)), new

            return read

        hidden, inner = jax.lax.switch(chosen, [again(span) for span in spans], rows)
        return take(hidden, before[:, None] + jnp.arange(x.shape[1])), (rows, after, inner)

    @staticmethod
    def _rest(span: int, room: int):
        return (0, 0), (0, room - span), (0, 0)


def main(config: MemGenBenchmark) -> None:
    """Print tokens/s of generation, and times of training steps."""
    print(
        f"d={config.embed_dim}, {config.num_layers} layers, {config.latents} latents an event, "
        f"prompts of {config.prompt}, {config.new_tokens} new tokens; tokens/s"
    )
    print("batch  plain loop  weaving  events/token  again at each event | slower than plain  "
          "faster than again")  # fmt: skip
    for batch in config.batches:
        runs = {
            "plain": Generation(config, batch, NeverInvoke()),
            "weaving": Generation(config, batch, AlwaysInvoke()),
            "again": Generation(config, batch, AlwaysInvoke(), again=True),
        }
        best = interleaved(runs, config.repeats)
        tokens = batch * config.new_tokens
        print(
            f"{batch:5} {tokens / best['plain']:11.0f} {tokens / best['weaving']:8.0f} "
            f"{runs['weaving'].events / tokens:13.3f} {tokens / best['again']:20.0f} | "
            f"{best['weaving'] / best['plain']:17.2f} {best['again'] / best['weaving']:18.2f}",
            flush=True,
        )
    runs = {
        "two passes": training_step(config, None),
        "exact": training_step(config, latents_see_latents=True),
        "one pass": training_step(config, latents_see_latents=False),
    }
    best = interleaved(runs, config.repeats)
    print(
        f"SFT step, batch {config.sft_batch}, {config.sft_tokens} tokens, {config.sft_events} "
        "events, forward and backward; ms (times one weaver and one reasoner pass)"
    )
    for name, seconds in best.items():
        print(f"{name:10} {1e3 * seconds:8.1f} ({seconds / best['two passes']:.2f})")


def interleaved(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """The smallest of several times of each run, in seconds, after one that compiles."""
    for run in runs.values():
        run()
    times = [{name: run() for name, run in runs.items()} for _ in range(repeats)]
    return {name: min(time[name] for time in times) for name in runs}


def build(config: MemGenBenchmark, events: int, latents_see_latents: bool = True) -> MemGen:
    """A MemGen with random weights."""
    model = ModelConfig(
        vocab_size=config.vocab_size,
        embed_dim=config.embed_dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
    )
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
    """One generation, timed without its prefill."""

    def __init__(self, config: MemGenBenchmark, batch: int, policy: Any, again: bool = False):
        self._config, self._batch = config, batch
        # More than will be asked for; none where nothing is woven, so that caches are no larger.
        never = isinstance(policy, NeverInvoke)
        events = 0 if never else 2 * round(config.weave * config.new_tokens)
        self._memgen = build(config, events)
        if again:
            reasoner = FromScratch(self._memgen.reasoner, config.latents)
            self._memgen = self._memgen.with_reasoner(reasoner)
        self._request = make_request(self._memgen, config.new_tokens, policy, temperature=1.0)
        self.events = 0

    def __call__(self) -> float:
        config, shape = self._config, (self._batch, self._config.prompt)
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)
        length = jnp.full(shape[:1], config.prompt, jnp.int32)
        keys = row_keys(0, [row.tolist() for row in tokens])
        room = config.prompt + config.new_tokens
        session = begin(self._memgen, jnp.asarray(tokens), length, keys, room)
        jax.block_until_ready(session)
        start = time.perf_counter()
        response, _ = respond(self._memgen, session, self._request, config.new_tokens)
        jax.block_until_ready(response)
        seconds = time.perf_counter() - start
        self.events = int((np.asarray(response.points) >= 0).sum())
        return seconds


def training_step(config: MemGenBenchmark, latents_see_latents: bool | None) -> Callable[[], float]:
    """Loss and gradients of the weaver; None: one pass of each decoder, and nothing inserted."""
    events, length = config.sft_events, config.sft_tokens
    memgen = build(config, events - 1, latents_see_latents is not False)
    whole = length + events * config.latents
    shape = (config.sft_batch, whole if latents_see_latents is None else length)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)
    tokens = jnp.asarray(tokens)
    place = jnp.arange(shape[1])
    loss_mask = jnp.broadcast_to((place >= length // 2) & (place < length), shape)
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
            read = memgen.weaving().read(memgen.weaver.context(vectors))
            hidden = memgen.reasoner.hidden_states(vectors + memgen.weaver.memory(read))
            return -token_log_probs(memgen.reasoner, hidden, tokens, loss_mask).sum()

        return jax.value_and_grad(loss)(params)

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(gradients(params, rest))
        return time.perf_counter() - start

    return run
