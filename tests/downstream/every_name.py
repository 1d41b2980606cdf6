# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""A user's file that names everything public, for a strict type checker; it never runs.

Mistakes that the checker must find carry a comment that says so; where it finds none, it reports
the comment.
"""

from collections.abc import Mapping
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import memgen
import thoughtbubbles as tb


def configs() -> tb.ModelConfig:
    config = tb.ModelConfig.preset("tiny", policy=tb.PrefixRank(ratio=2.0), fork_layers=(1, 2))
    tb.ModelConfig.preset("tiny", polcy=tb.TopK(2.0))  # pyright: ignore[reportCallIssue]
    tb.ModelConfig.preset("tiny", dtype="float31")  # pyright: ignore[reportArgumentType]
    base: tb.ArchitectureConfig = tb.PRESETS["tiny"]
    count: int = base.num_params() + config.slots(8)[0]
    assert count
    return config


def model(config: tb.ModelConfig, tokens: jax.Array) -> jax.Array:
    made = tb.Thoughtbubbles(config, rngs=nnx.Rngs(0))
    output = made.run(tokens)
    assert_type(output, tb.Output)
    first: tb.Streams = output.forks[0]
    streams = tb.Block(config, rngs=nnx.Rngs(0))(first)
    backbone: tb.Backbone = made.backbone()
    hidden: jax.Array = backbone.hidden_states(backbone.embed_tokens(tokens))
    name: type[tb.Architecture] = tb.ARCHITECTURES["thoughtbubbles"]
    assert name and streams.x.shape == hidden.shape
    return made(tokens)


def forking(x: jax.Array, key: jax.Array) -> jax.Array:
    fork = tb.Fork(64, tb.Threshold(ratio=1.5), rngs=nnx.Rngs(0))
    streams = fork(tb.Streams.start(x), track=True, key=key)
    streams = streams.replace(x=streams.x * 2)
    streams.replace(y=streams.x)  # pyright: ignore[reportCallIssue]
    streams.replace(x="x")  # pyright: ignore[reportArgumentType]
    bias: jax.Array = streams.attention_bias(16) + streams.positions() + streams.score()
    tb.merge(streams, "probability")  # pyright: ignore[reportArgumentType]
    streams.page([["a", "b"]]).save("streams.html")
    return tb.merge(streams, "rightmost") + bias.sum()


def cached(x: jax.Array, first: jax.Array, keys: jax.Array) -> dict[str, jax.Array]:
    fork = tb.Fork(64, rngs=nnx.Rngs(0))
    cache: tb.ForkCache = fork.init_cache(x.shape[0], 128)
    streams = tb.Streams.start(x, first=first)
    before: tb.KVSlots = tb.token_slots(streams, 128)
    streams, slots, cache = fork.extend(streams, cache)
    stored = {"key": keys}
    assert_type(slots, tb.KVSlots)
    mask: jax.Array = slots.visible() & (before.index() >= 0)
    assert mask.ndim and cache.slots
    return slots.write(stored, {"key": streams.x})


def rows(tokens: jax.Array, mask: jax.Array, segment_ids: jax.Array) -> tuple[jax.Array, ...]:
    aligned, length, rank = tb.left_align(tokens, mask)
    packed, lengths = tb.split_segments(tokens, segment_ids, 2)
    back = tb.restore_alignment(aligned, mask, rank)
    return back, tb.join_segments(packed.astype(jnp.float32), segment_ids), length, lengths


def of_numpy(x: np.ndarray, tokens: np.ndarray, mask: np.ndarray, length: np.ndarray) -> jax.Array:
    streams = tb.Streams.start(x, length, first=length)
    aligned, _, rank = tb.left_align(tokens, mask)
    rows, _ = tb.split_segments(tokens, tokens, 2)
    assert_type(streams.x, jax.Array)
    return tb.restore_alignment(aligned, mask, rank) + rows.sum()


def models_of_numpy(
    made: tb.Thoughtbubbles, tokens: np.ndarray, mask: np.ndarray, length: np.ndarray
) -> jax.Array:
    """Arrays of a data loader need no conversion."""
    output = made.run(tokens, length)
    _, cache = made.advance(made.init_cache(len(tokens), 64), tokens, length, fresh=True)
    made.advance(cache, tokens[:, :1], length)
    loss, weight, _ = made.loss(tokens)
    scores = made.log_prob(output, tokens) + made.logits_at(output, length - 1).sum()
    hidden = made.backbone().hidden_states(made.backbone().embed_tokens(tokens), length)
    return made(tokens, mask).sum() + loss / weight + scores.sum() + hidden.sum()


def memory_of_numpy(
    made: memgen.MemGen, tokens: np.ndarray, mask: np.ndarray, length: np.ndarray, keys: jax.Array
) -> jax.Array:
    plan = memgen.plan_insertions(tokens, mask, made.boundary[...], made.config)
    total, weight = memgen.sft_loss(made, tokens, mask, plan)
    scores = memgen.decision_log_probs(made, tokens, tokens, plan)
    price, _ = memgen.trigger_loss(scores, tokens, length)
    session = memgen.begin(made, tokens, length, keys, 64)
    memgen.observe(made, session, tokens, length)
    return total / weight + price + made.predictors(tokens, plan).sum()


class Half(tb.PolicyDefaults):
    """Keeps originals alone."""

    causal = True

    def capacity(self, num_tokens: int) -> int:
        return num_tokens

    def keep(self, candidates: tb.Candidates) -> jax.Array:
        return candidates.forced

    def init_state(self, batch: int, num_candidates: int) -> tuple[()]:
        return ()

    def keep_next(self, candidates: tb.Candidates, state: tuple[()]) -> tuple[jax.Array, tuple[()]]:
        return candidates.forced, state


def policies() -> tuple[tb.Policy, tb.CausalPolicy]:
    return tb.Fork(64, Half(), rngs=nnx.Rngs(0)).policy, Half()


class Decoder(memgen.Uncached):
    """A decoder of one's own."""

    embed_dim, vocab_size = 64, 256

    def __init__(self, net: nnx.Module):
        self.net = net

    @property
    def lora_targets(self) -> Mapping[str, tuple[tuple[int, ...], int, int]]:
        return memgen.linear_layers(self.net)

    def apply_lora(self, adapter: Mapping[str, Any]) -> "Decoder":
        return Decoder(memgen.apply_lora(self.net, adapter))

    def merge_lora(self, deltas: Mapping[str, jax.Array]) -> "Decoder":
        return Decoder(memgen.merge_lora(self.net, deltas))

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        return jax.nn.one_hot(tokens, 64)

    def hidden_states(
        self,
        x: jax.Array,
        length: jax.Array | None = None,
        *,
        positions: jax.Array | None = None,
        visible: jax.Array | None = None,
    ) -> jax.Array:
        return x

    def unembed(self, hidden: jax.Array) -> jax.Array:
        return hidden


def memory(net: nnx.Module, text: jax.Array, length: jax.Array) -> memgen.MemGen:
    lora = memgen.LoRAConfig(rank=4, targets=("q",))
    config = memgen.MemGenConfig(
        memgen.WeaverConfig(lora=lora), memgen.TriggerConfig("tokens", lora=lora)
    )
    table = memgen.boundary_table([chr(i) for i in range(256)])
    decoder: memgen.DecoderBackbone = Decoder(net)
    made = memgen.MemGen(decoder, config, boundary=table, rngs=nnx.Rngs(0))
    weaver: memgen.Weaver = made.weaver
    trigger: memgen.Trigger | None = made.trigger
    assert memgen.make_adapter and memgen.merge_lora and memgen.TriggerParam
    kinds: list[type[nnx.Param[Any]]] = [memgen.WeaverParam, memgen.TriggerParam]
    snippets = memgen.Snippets(text, length)
    assert weaver.config and trigger and kinds and snippets.length.ndim
    params: dict[Any, Any] = memgen.trained_params(made)
    return memgen.load_params(made, params)


def training(
    made: memgen.MemGen, tokens: jax.Array, loss_mask: jax.Array, advantages: jax.Array
) -> jax.Array:
    plan: memgen.Plan = memgen.plan_insertions(tokens, loss_mask, made.boundary[...], made.config)
    total, weight = memgen.sft_loss(made, tokens, loss_mask, plan)
    hidden = made.predictors(tokens, plan)
    by_token = memgen.token_log_probs(made.reasoner, hidden, tokens, loss_mask)
    decisions = tokens * 0
    log_probs = memgen.decision_log_probs(made, tokens, decisions, plan)
    weights = np.ones(len(tokens))
    memgen.invocation_penalty(
        np.asarray(decisions), weights, weights, weights, weights > 0, weight=0.1
    )
    price, aux = memgen.trigger_loss(log_probs, decisions, advantages)
    assert aux is not None
    return total / weight + by_token.sum() + price


def generating(
    made: memgen.MemGen, tokens: jax.Array, length: jax.Array, keys: jax.Array
) -> list[list[int]]:
    rules: list[memgen.TriggerPolicy] = [
        memgen.AlwaysInvoke(),
        memgen.NeverInvoke(),
        memgen.RandomInvoke(0.5),
        memgen.LearnedInvoke(sample=True),
    ]
    response: memgen.Response = memgen.generate(made, [[1, 2]], 8, policy=rules[0], stop=[3])
    response.page(chr, [[1, 2]]).save("response.html")
    request = memgen.make_request(made, 8, rules[1])
    session = memgen.begin(made, tokens, length, keys, 64, request=request)
    session = memgen.observe(made, session, tokens, length)
    response, session = memgen.respond(made, session, request, 8)
    plan = memgen.plan_from_decisions(response.decisions, length, made.config)
    memgen.replay(made, tokens, length, plan, response.latents, keys, 64)
    ends: jax.Array = memgen.is_boundary(made.boundary[...], tokens[:, -1], tokens[:, -2])
    assert ends.ndim
    return response.texts
