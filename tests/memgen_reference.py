"""A slow float64 oracle of MemGen, written from its description (arXiv 2509.24704).

One row at a time, one step at a time, everything recomputed at every step, adapters merged into
the weights: it shares nothing with the library and imports neither it nor JAX.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import reference

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Decoder:
    """What reads vectors: `hidden` of `[T, D]` to `[T, D]` after the final norm."""

    embed: Callable[[Sequence[int]], Array]
    hidden: Callable[[Array], Array]
    unembed: Callable[[Array], Array]


def thoughtbubbles(params: dict[str, Any], config: Any) -> Decoder:
    """A Thoughtbubbles model, plain or forking, from its nested dict of arrays (head untied)."""
    params = reference.in_float64(params)

    def hidden(x: Array) -> Array:
        streams, forks = [reference.Stream(row, 0.0, i) for i, row in enumerate(x)], 0
        for layer in range(config.num_layers):
            if layer in config.fork_layers:
                fork = params["forks"][forks]
                streams, _ = reference.fork(fork, config, streams, len(x), None)
                forks += 1
            block = reference.at_layer(params["blocks"], layer)
            streams = reference.block(block, config, streams)
        merged = np.zeros_like(x)
        for stream in streams:
            merged[stream.token] += math.exp(stream.log_score) * stream.x
        return np.stack([reference.norm(params["final_norm"], config, row) for row in merged])

    return Decoder(lambda ids: params["embed"][list(ids)], hidden, lambda h: h @ params["head"])


def merged(params: dict[str, Any], adapter: dict[str, Any], scale: float) -> dict[str, Any]:
    """Parameters of a Thoughtbubbles model with `x A B * scale` added to its attention maps."""
    params = reference.in_float64(params)
    adapter = reference.in_float64(adapter)
    attention = dict(params["blocks"]["attention"])
    for name, low in adapter.items():
        attention[name] = attention[name] + (
            np.einsum("ldr,lre->lde", low["a"], low["b"]).reshape(attention[name].shape) * scale
        )
    return {**params, "blocks": {**params["blocks"], "attention": attention}}


def weave(
    weaver: dict[str, Any], decoder: Decoder, context: Array, kind: str, eps: float = 1e-5
) -> Array:
    """Latents `[K, d_r]` of one event.

    Args:
        weaver: its nested dict of arrays; the decoder has its adapter in it.
        context: `[T, d_r]`.
        kind: `prompt` or `inference`.
    """
    weaver = reference.in_float64(weaver)
    if (bank := weaver.get(kind)) is None:
        return np.zeros((0, context.shape[1]))
    queries = []
    for row in bank["queries"]:
        normed = (row - row.mean()) / math.sqrt(row.var() + eps)
        queries.append(bank["scale"] * (normed * bank["norm_scale"] + bank["norm_bias"]))
    if not queries:
        return np.zeros((0, context.shape[1]))
    rows = [row @ weaver["to_weaver"]["kernel"] + weaver["to_weaver"]["bias"] for row in context]
    out = decoder.hidden(np.stack(rows + queries))[-len(queries) :]
    latents = out @ weaver["to_reasoner"]["kernel"] + weaver["to_reasoner"]["bias"]
    if weaver.get("gain") is not None:
        size = np.sqrt((latents**2).mean(axis=1, keepdims=True))
        latents = latents / size * weaver["gain"]
    return latents


def concatenated(vectors: Array, events: Sequence[tuple[int, Array]]) -> Array:
    """The inputs of one row: each event's latents right before its token, by lists alone."""
    inputs_embeds: list[Array] = []
    for i, row in enumerate(vectors):
        for point, latents in events:
            if point == i:
                inputs_embeds += list(latents)
        inputs_embeds.append(row)
    return np.stack(inputs_embeds)


def predictors(length: int, events: Sequence[tuple[int, int]]) -> list[int]:
    """Places whose successor is a token: they predict tokens 0, 1, ... in this order."""
    kinds: list[str] = []
    for i in range(length):
        for point, width in events:
            if point == i:
                kinds += ["latent"] * width
        kinds.append("token")
    return [place - 1 for place, kind in enumerate(kinds) if kind == "token"]


@dataclasses.dataclass
class Generated:
    """One row of `generate`: what it wrote, and the narrowest choice that it made."""

    tokens: list[int]
    log_probs: list[float]
    decisions: list[int]
    inputs_embeds: list[Array]
    is_latent: list[bool]
    margin: float


def generate(
    decoder: Decoder,
    weaver_decoder: Decoder,
    weaver: dict[str, Any],
    prompt: Sequence[int],
    new_tokens: int,
    is_boundary: Callable[[int], bool],
    max_events: int,
    decide: Callable[[int, list[int], list[Array]], bool],
    *,
    context: str = "embeddings",
    latents_see_latents: bool = True,
    stop: Sequence[int] = (),
) -> Generated:
    """One row, greedy: at every step decide, insert, predict, and read all of it again.

    Args:
        is_boundary: of the last id.
        decide: told the step, the ids and the input sequence so far.
    """
    tokens, used = list(prompt), 0
    inputs_embeds = list(decoder.embed(prompt))
    made = Generated([], [], [], inputs_embeds, [False] * len(inputs_embeds), math.inf)
    for step in range(new_tokens):
        asked = step == 0 or (is_boundary(tokens[-1]) and used < max_events)
        decision = int(decide(step, tokens, inputs_embeds)) if asked else -1
        made.decisions.append(decision)
        if decision == 1:
            seen = np.stack(inputs_embeds)
            if not latents_see_latents:
                seen = decoder.embed(tokens)
            elif context == "hidden":
                seen = decoder.hidden(seen)
            new = weave(weaver, weaver_decoder, seen, "prompt" if step == 0 else "inference")
            inputs_embeds += list(new)
            made.is_latent += [True] * len(new)
            used += step > 0
        logits = decoder.unembed(decoder.hidden(np.stack(inputs_embeds))[-1])
        token = int(logits.argmax())
        second, first = np.sort(logits)[-2:]
        made.margin = min(made.margin, float(first - second))
        made.log_probs.append(float(logits[token] - logits.max() - _log_sum(logits)))
        made.tokens.append(token)
        tokens.append(token)
        inputs_embeds += list(decoder.embed([token]))
        made.is_latent.append(False)
        if token in stop:
            break
    return made


def _log_sum(logits: Array) -> float:
    return math.log(np.exp(logits - logits.max()).sum())


def log_prob_of_targets(
    decoder: Decoder, inputs_embeds: Array, places: Sequence[int], targets: Sequence[int]
) -> list[float]:
    """Of each target, by the output at its place."""
    hidden = decoder.hidden(inputs_embeds)
    found = []
    for place, target in zip(places, targets, strict=True):
        logits = decoder.unembed(hidden[place])
        found.append(float(logits[target] - logits.max() - _log_sum(logits)))
    return found


def trigger_logits(trigger: dict[str, Any], decoder: Decoder, x: Array) -> Array:
    """Skip and invoke `[2]` after vectors `x [T, D]`; the decoder has its adapter in it."""
    trigger = reference.in_float64(trigger)
    return decoder.hidden(x)[-1] @ trigger["kernel"] + trigger["bias"]
