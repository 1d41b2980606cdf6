"""A slow float64 reference of the whole Thoughtbubbles model, written from the equations.

One sequence at a time, a stream is a record, everything is a plain loop: meant to be read beside
the paper (arXiv 2510.00219), and to share nothing with the library. It imports neither JAX nor us.

`config` is anything with the fields of `ModelConfig`; `params` is the nested dict of the model's
arrays, with the blocks stacked on axis 0.
Sizes: T tokens, N streams, D width, H heads, G key-value heads, K head width, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Stream:
    """A residual stream: its residual `x` [D], cumulative log-score and the token it belongs to."""

    x: Array
    log_score: float
    token: int


class Candidate(NamedTuple):
    """A stream that may go on behind a fork layer: the fork of `parent`, or `parent` itself."""

    parent: int
    is_fork: bool


@dataclass(frozen=True)
class ForkTrace:
    """What one fork layer did.

    `log_scores` holds the cumulative log-score of every candidate [2N] in reading order
    (fork 0, keep 0, fork 1, ...). `gap` is the key of the last kept minus the key of the first
    dropped candidate (causal policies: see `select_in_order`): infinite if nothing was contested.
    """

    kept: list[Candidate]
    log_scores: list[float]
    gap: float


@dataclass(frozen=True)
class Trace:
    """The model's output `logits` [T,V], what each fork layer did, and the streams at the merge."""

    logits: Array
    forks: list[ForkTrace]
    streams: list[Stream]

    @property
    def gap(self) -> float:
        """The narrowest selection of the pass; within float32 noise it may fall otherwise."""
        return min((fork.gap for fork in self.forks), default=math.inf)


def forward(
    params: dict[str, Any],
    config: Any,
    tokens: Sequence[int],
    decisions: Sequence[Sequence[Candidate]] | None = None,
) -> Trace:
    """The model on one unpadded sequence.

    `decisions`, the kept candidates of each fork layer, replaces the selection if given.
    """
    params = in_float64(params)
    streams = []
    for i, token in enumerate(tokens):
        for _ in range(config.copies):
            streams.append(Stream(x=params["embed"][token], log_score=0.0, token=i))

    forks: list[ForkTrace] = []
    for layer in range(config.num_layers):
        if layer in config.fork_layers:
            index = len(forks)
            replay = None if decisions is None else decisions[index]
            streams, trace = fork(params["forks"][index], config, streams, len(tokens), replay)
            forks.append(trace)
        streams = block(at_layer(params["blocks"], layer), config, streams)

    logits = np.stack([read_out(params, config, streams, i) for i in range(len(tokens))])
    return Trace(logits=logits, forks=forks, streams=streams)


# --- forking


def fork(
    p: dict[str, Any],
    config: Any,
    streams: list[Stream],
    num_tokens: int,
    replay: Sequence[Candidate] | None,
) -> tuple[list[Stream], ForkTrace]:
    """One fork layer: score every stream, rank the 2N candidates, keep the best k (eqs. 1-6)."""
    candidates: list[Candidate] = []
    log_scores: list[float] = []
    keys: list[float] = []
    log_gate = math.log(max(10 * abs(float(p["gate"])), 1e-12)) if "gate" in p else 0.0
    for n, stream in enumerate(streams):
        z_fork, z_keep = norm(p["norm"], config, stream.x) @ p["score"]  # eq. 1
        # The fork stands directly left of its parent.
        candidates.append(Candidate(parent=n, is_fork=True))
        log_scores.append(stream.log_score + log_sigmoid(z_fork) + log_gate)  # eq. 2
        keys.append(log_scores[-1])
        candidates.append(Candidate(parent=n, is_fork=False))
        log_scores.append(stream.log_score + log_sigmoid(z_keep))  # eq. 3
        keys.append(log_scores[-1])
        is_original = n + 1 == len(streams) or streams[n + 1].token != stream.token
        if config.forced_keep and is_original:
            keys[-1] = math.inf  # eq. 4: the key is forced, the stored score is not
            if not config.score_originals:
                log_scores[-1] = 0.0

    tokens = [streams[c.parent].token for c in candidates]
    if replay is not None:
        kept, gap = [2 * c.parent + (0 if c.is_fork else 1) for c in replay], math.inf
    elif type(config.policy).__name__ == "TopK":
        kept, gap = select(keys, budget(config, num_tokens, len(streams)))  # eqs. 5-6
    else:
        threshold = clipped_threshold(p, config.policy)
        kept, gap = select_in_order(config.policy, keys, tokens, num_tokens, threshold)
        if threshold is not None and config.policy.gate:
            for c in kept:
                if keys[c] < math.inf:
                    log_scores[c] = math.log((math.exp(keys[c]) - threshold) / (1 - threshold))

    survivors = []
    for c in kept:
        parent = streams[candidates[c].parent]
        x = parent.x
        if candidates[c].is_fork and config.fork_embedding:
            x = x + p["embedding"]
        survivors.append(Stream(x=x, log_score=log_scores[c], token=parent.token))
    return survivors, ForkTrace(kept=[candidates[c] for c in kept], log_scores=log_scores, gap=gap)


def log_sigmoid(z: float) -> float:
    """log sigma(z), never below -20."""
    return max(-float(np.logaddexp(0.0, -z)), -20.0)


def budget(config: Any, num_tokens: int, num_streams: int) -> int:
    """How many of the 2N candidates live: kappa, or exactly ceil(ratio T): 1.1 times 10 is 11."""
    kappa = config.policy.streams
    if kappa is None:
        ratio = Fraction(str(config.policy.ratio)).limit_denominator(1000)
        kappa = math.ceil(ratio * num_tokens)
    return min(2 * num_streams, kappa)


def select(keys: list[float], k: int) -> tuple[list[int], float]:
    """The k largest keys in reading order (ties go to the left), and the margin of the last one."""
    ranked = sorted(range(len(keys)), key=lambda c: (-keys[c], c))
    contested = k < len(keys) and keys[ranked[k - 1]] < math.inf
    gap = keys[ranked[k - 1]] - keys[ranked[k]] if contested else math.inf
    return sorted(ranked[:k]), gap


def clipped_threshold(p: dict[str, Any], policy: Any) -> float | None:
    if "threshold" not in p:
        return None
    return min(max(float(p["threshold"]) + policy.offset, 0.0), 0.999)


def select_in_order(
    policy: Any, keys: list[float], tokens: list[int], num_tokens: int, threshold: float | None
) -> tuple[list[int], float]:
    """The causal policies, token by token: who wants to live, and for whom there is room.

    With a threshold a candidate wants to live if its score exceeds it, otherwise if fewer than
    `floor(ratio * tokens so far)` candidates so far rank higher; ranks go by keys to 1/1024.
    The margin is that of the narrowest decision: of a score to the threshold, or of a key to the
    next rounding where another key is close.
    """
    ratio = Fraction(str(policy.ratio)).limit_denominator(1000)
    rounded = [key if key == math.inf else round(key * 1024) for key in keys]
    rank_key = [(-key, c) for c, key in enumerate(rounded)]
    kept: list[int] = []
    granted = 0
    for t in range(num_tokens):
        mine = [c for c in range(len(keys)) if tokens[c] == t]
        if threshold is not None:
            wants = [c for c in mine if math.exp(min(keys[c], 0.0)) > threshold]
        else:
            window = policy.window or num_tokens
            rivals = [c for c in range(len(keys)) if t - window < tokens[c] <= t]
            room = math.floor(ratio * min(t + 1, window))
            wants = [c for c in mine if sum(rank_key[r] < rank_key[c] for r in rivals) < room]
        wants = [c for c in wants if keys[c] < math.inf]
        limit = math.floor((ratio - 1) * (t + 1)) + policy.burst
        wants = sorted(wants, key=lambda c: rank_key[c])[: limit - granted]
        granted += len(wants)
        kept += sorted([c for c in mine if keys[c] == math.inf] + wants)
    finite = [key for key in keys if key < math.inf]
    margins = [math.inf]
    if threshold is not None:
        margins += [abs(math.exp(key) - threshold) for key in finite]
    for i, key in enumerate(finite):
        if any(abs(key - other) < 2 / 1024 for j, other in enumerate(finite) if j != i):
            margins.append(abs((key * 1024) % 1 - 0.5) / 1024)
    return kept, min(margins)


# --- transformer


def block(p: dict[str, Any], config: Any, streams: list[Stream]) -> list[Stream]:
    """One transformer block: what it writes to a stream is scaled by its score (eqs. 9-10)."""
    writes = attention(
        p["attention"], config, streams, [norm(p["attention_norm"], config, s.x) for s in streams]
    )
    streams = [add(config, s, write) for s, write in zip(streams, writes, strict=True)]
    writes = [mlp(p["mlp"], config, norm(p["mlp_norm"], config, s.x)) for s in streams]
    return [add(config, s, write) for s, write in zip(streams, writes, strict=True)]


def add(config: Any, stream: Stream, write: Array) -> Stream:
    """x + p * write."""
    gate = math.exp(stream.log_score) if config.residual_scaling else 1.0
    return Stream(x=stream.x + gate * write, log_score=stream.log_score, token=stream.token)


def attention(
    p: dict[str, Any], config: Any, streams: list[Stream], inputs: list[Array]
) -> list[Array]:
    """Causal attention over the stream order, attenuated by the keys' scores (eq. 8)."""
    num_heads, head_dim = p["q"].shape[1:]
    num_groups = p["k"].shape[1]
    positions = rotary_positions(config, streams)

    queries, keys, values = [], [], []  # one [H,K], [G,K], [G,K] per stream
    for stream, x, position in zip(streams, inputs, positions, strict=True):
        q, k, v = (np.tensordot(x, p[name], axes=1) for name in "qkv")
        if config.biases in ("all", "qkv"):
            q, k, v = q + p["q_bias"], k + p["k_bias"], v + p["v_bias"]
        if config.qk_norm:
            q = np.stack([rms_norm(p["q_norm"]["scale"], config.norm_eps, head) for head in q])
            k = np.stack([rms_norm(p["k_norm"]["scale"], config.norm_eps, head) for head in k])
        queries.append([rotate(head, position, config.rope_base) for head in q])
        keys.append([rotate(head, position, config.rope_base) for head in k])
        values.append(v * (math.exp(stream.log_score) if config.value_scaling else 1.0))

    outputs = []
    for n in range(len(streams)):
        output = p["o_bias"] if config.biases == "all" else 0.0
        for h in range(num_heads):
            g = h // (num_heads // num_groups)  # consecutive query heads share a key-value head
            logits = []
            for m in range(n + 1):
                log_score = streams[m].log_score if config.key_bias else 0.0
                product = queries[n][h] @ keys[m][g]
                if config.score_bias == "head":
                    logits.append((product + log_score) / math.sqrt(head_dim))
                else:
                    logits.append(product / math.sqrt(head_dim) + log_score)
            weights = softmax(np.array(logits))
            read = sum(weights[m] * values[m][g] for m in range(n + 1))
            output = output + read @ p["o"][h]
        outputs.append(output)
    return outputs


def rotary_positions(config: Any, streams: list[Stream]) -> list[float]:
    """Token i's rightmost of n streams stands at i, the p-th to its left at i - p/n (eq. 13)."""
    positions = []
    for index, stream in enumerate(streams):
        p = sum(other.token == stream.token for other in streams[index + 1 :])
        n = sum(other.token == stream.token for other in streams)
        positions.append(
            stream.token - p / n if config.fractional_positions else float(stream.token)
        )
    return positions


def rotate(head: Array, position: float, base: float) -> Array:
    """RoPE on one head [K]: the pair (c, c + K/2) is turned by position * base^(-2c/K)."""
    half = len(head) // 2
    out = np.empty_like(head)
    for c in range(half):
        angle = position * base ** (-2 * c / len(head))
        out[c] = head[c] * math.cos(angle) - head[c + half] * math.sin(angle)
        out[c + half] = head[c + half] * math.cos(angle) + head[c] * math.sin(angle)
    return out


def mlp(p: dict[str, Any], config: Any, x: Array) -> Array:
    """down(gelu(up x)) with the tanh approximation, or down(silu(gate x) * up x)."""
    with_bias = config.biases == "all"
    up = x @ p["up"] + (p["up_bias"] if with_bias else 0.0)
    if config.mlp == "swiglu":
        gate = x @ p["gate"] + (p["gate_bias"] if with_bias else 0.0)
        hidden = gate / (1 + np.exp(-gate)) * up
    else:
        hidden = 0.5 * up * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    return hidden @ p["down"] + (p["down_bias"] if with_bias else 0.0)


def norm(p: dict[str, Any], config: Any, x: Array) -> Array:
    """RMSNorm, or LayerNorm with a bias iff every linear map has one."""
    if config.norm == "rmsnorm":
        return rms_norm(p["scale"], config.norm_eps, x)
    centred = x - x.mean()
    y = centred / math.sqrt((centred**2).mean() + config.norm_eps) * p["scale"]
    return y + p["bias"] if config.biases == "all" else y


def rms_norm(scale: Array, eps: float, x: Array) -> Array:
    return x / math.sqrt((x**2).mean() + eps) * scale


# --- merge


def read_out(params: dict[str, Any], config: Any, streams: list[Stream], token: int) -> Array:
    """The prediction [V] behind one token: its bubble, merged."""
    bubble = [s for s in streams if s.token == token]
    if not config.fork_layers or config.merge == "rightmost":  # plain decoder, copy-k
        return decode(params, config, bubble[-1].x if bubble else np.zeros_like(params["embed"][0]))
    if config.merge == "residual":
        merged = np.zeros_like(params["embed"][0])
        for s in bubble:
            merged = merged + math.exp(s.log_score) * s.x
        return decode(params, config, merged)
    if not bubble:
        return np.full(len(params["embed"]), -math.log(len(params["embed"])))
    # eq. 11. A common factor in all scores of the bubble cancels; this one makes the best score 1.
    best = max(s.log_score for s in bubble)
    weights = [math.exp(s.log_score - best) for s in bubble]
    mixture = sum(
        w * softmax(decode(params, config, s.x)) for w, s in zip(weights, bubble, strict=True)
    )
    return np.log(mixture / sum(weights))


def decode(params: dict[str, Any], config: Any, x: Array) -> Array:
    """Final norm and head: [D] to [V]."""
    head = params["embed"].T if config.tied_head else params["head"]
    return norm(params["final_norm"], config, x) @ head


def softmax(logits: Array) -> Array:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


# --- parameters


def in_float64(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: in_float64(leaf) for name, leaf in tree.items()}
    if isinstance(tree, list | tuple):
        return [in_float64(leaf) for leaf in tree]
    return np.asarray(tree, dtype=np.float64)


def at_layer(tree: Any, layer: int) -> Any:
    """One block's parameters out of the stacked ones."""
    if isinstance(tree, dict):
        return {name: at_layer(leaf, layer) for name, leaf in tree.items()}
    return tree[layer]
