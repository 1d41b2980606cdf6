"""The small MemGens that the tests share, so that compiled programs are shared too."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from foreign_decoder import ForeignDecoder

import memgen
from memgen import LoRAConfig, MemGen, MemGenConfig, TriggerConfig, WeaverConfig
from memgen.request import bucket, pad_prompts, row_keys
from thoughtbubbles import Backbone, ModelConfig, PrefixRank, Thoughtbubbles, Threshold
from thoughtbubbles.architecture import architecture_of
from thoughtbubbles.hatchling import ForkingHatchlingConfig, HatchlingConfig
from thoughtbubbles.hatchling.attention import frequencies

VOCAB, PROMPT_LATENTS, INFERENCE_LATENTS, EVENTS = 100, 3, 2, 2
BOUNDARY = (np.arange(VOCAB) % 2 == 0).astype(np.uint8)
SEEDS = {"tokens": 3, "stream": 3, "reasoner_hidden": 1}  # triggers that skip, and invoke
LORA = LoRAConfig(rank=4, alpha=8.0)
PLAIN = ModelConfig(
    vocab_size=VOCAB,
    embed_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=48,
    tied_head=False,
)
FORKS: dict[str, Any] = {"num_layers": 3, "fork_layers": (1, 2), "merge": "residual"}
ONE_FORK: dict[str, Any] = {"num_layers": 1, "fork_layers": (0,), "merge": "residual"}
MODELS = {
    "plain": PLAIN,
    "rank": dataclasses.replace(PLAIN, **FORKS, policy=PrefixRank(2.0)),
    "threshold": dataclasses.replace(PLAIN, **FORKS, policy=Threshold(2.0)),
    # A loop over these compiles in half the time: for all that is not about depth.
    "one fork by rank": dataclasses.replace(PLAIN, **ONE_FORK, policy=PrefixRank(2.0)),
    "one fork by threshold": dataclasses.replace(PLAIN, **ONE_FORK, policy=Threshold(2.0)),
    "shallow": dataclasses.replace(PLAIN, num_layers=1),
}
HATCHLINGS = {
    "hatchling": HatchlingConfig(
        vocab_size=VOCAB, embed_dim=32, num_neurons=128, num_layers=1, num_heads=2, damping=True
    ),
    "forking hatchling": ForkingHatchlingConfig(
        vocab_size=VOCAB, embed_dim=32, num_neurons=128, num_layers=2, num_heads=2
    ),
}
CONFIG = MemGenConfig(
    WeaverConfig(PROMPT_LATENTS, INFERENCE_LATENTS, lora=LORA),
    TriggerConfig("tokens", lora=LORA),
    max_inference_events=EVENTS,
)


class MyDecoder(memgen.Uncached):
    """An ordinary decoder made of `nnx.Linear`s, as MemGen wants it."""

    def __init__(self, model):
        self.model = model
        self.embed_dim, self.vocab_size = model.embed.features, model.embed.num_embeddings

    @property
    def lora_targets(self):
        return memgen.linear_layers(self.model)

    def apply_lora(self, adapter):
        return MyDecoder(memgen.apply_lora(self.model, adapter))

    def embed_tokens(self, tokens):
        return self.model.embed(tokens)

    def hidden_states(self, x, length=None, *, positions=None, visible=None):
        if positions is None or visible is None:  # one text from left to right
            place = jnp.arange(x.shape[1])
            positions = jnp.broadcast_to(place, x.shape[:2])
            visible = (place[:, None] >= place)[None]
        return self.model.hidden(x, positions, visible)

    def unembed(self, hidden):
        return self.model.head(hidden).astype(jnp.float32)


def filled(abstract: Any, seed: int, scale: float = 0.25) -> Any:
    """All parameters random, so that each of them matters; made by NumPy: nothing to compile."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(BOUNDARY)
        values = rng.normal(size=leaf.shape) * scale
        if "threshold" in name:
            values = np.full(leaf.shape, 0.3)
        elif "scale" in name or "gain" in name:
            values = 1 + values
        elif "frequency" in name:
            values = np.tile(frequencies(leaf.shape[1], 65_536.0), (leaf.shape[0], 1))
        elif "score" in name or "kernel" in name and "trigger" in name:
            values = 2 * values
        return jnp.asarray(values.astype(leaf.dtype))

    return jax.tree_util.tree_map_with_path(fill, abstract)


@functools.cache
def backbone(kind: str, embed_dim: int = 32, dtype: str = "float32") -> Any:
    if kind == "foreign":
        build = lambda: MyDecoder(ForeignDecoder(VOCAB, embed_dim, 2, 4, 128, rngs=nnx.Rngs(0)))  # noqa: E731
    elif kind in HATCHLINGS:
        config = dataclasses.replace(HATCHLINGS[kind], embed_dim=embed_dim, dtype=dtype)
        build = lambda: architecture_of(config)(config, rngs=nnx.Rngs(0)).backbone()  # noqa: E731
    else:
        config = dataclasses.replace(MODELS[kind], embed_dim=embed_dim, dtype=dtype)
        build = lambda: Backbone(Thoughtbubbles(config, rngs=nnx.Rngs(0)))  # noqa: E731
    return filled(nnx.eval_shape(build), seed=7)


@functools.cache
def memgen_of(
    kind: str = "shallow",
    config: MemGenConfig = CONFIG,
    weaver_width: int | None = None,
    dtype: str = "float32",
) -> MemGen:
    """A MemGen around one of the decoders, all of it far from its initial values."""
    reasoner = backbone(kind, dtype=dtype)
    weaver_backbone = None if weaver_width is None else backbone("plain", weaver_width)
    if kind == "foreign":
        lora = dataclasses.replace(LORA, targets=("blocks/0/q", "blocks/1/v"))
        config = with_lora(config, lora)
    if kind in HATCHLINGS:
        config = with_lora(config, dataclasses.replace(LORA, targets=("dx", "e")))
    build = lambda: MemGen(  # noqa: E731
        reasoner, config, boundary=BOUNDARY, weaver_backbone=weaver_backbone, rngs=nnx.Rngs(1)
    )
    made = filled(nnx.eval_shape(build), seed=8)
    made.reasoner, made.weaver_backbone = nnx.data(reasoner), nnx.data(weaver_backbone)
    if config.trigger is not None:
        made.trigger = filled(made.trigger, SEEDS[config.trigger.source])
    return made


@functools.cache
def fresh_memgen(kind: str = "shallow", config: MemGenConfig = CONFIG) -> MemGen:
    """The same with weaver and trigger as they begin."""
    reasoner = backbone(kind)
    build = lambda: MemGen(reasoner, config, boundary=BOUNDARY, rngs=nnx.Rngs(1))  # noqa: E731
    made = build()
    made.reasoner = nnx.data(reasoner)
    return made


def with_lora(config: MemGenConfig, lora: LoRAConfig) -> MemGenConfig:
    trigger = config.trigger and dataclasses.replace(config.trigger, lora=lora)
    return dataclasses.replace(
        config, weaver=dataclasses.replace(config.weaver, lora=lora), trigger=trigger
    )


def weaver_config(**changes: Any) -> MemGenConfig:
    return dataclasses.replace(CONFIG, weaver=dataclasses.replace(CONFIG.weaver, **changes))


def trigger_config(source: Any) -> MemGenConfig:
    return dataclasses.replace(CONFIG, trigger=TriggerConfig(source, lora=LORA))


def random_tokens(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, shape).astype(np.int32))


def pure(module: Any) -> dict[str, Any]:
    """The module's arrays as a nested dict."""
    return nnx.to_pure_dict(nnx.state(module))


@jax.jit
def read(decoder: Any, x: jax.Array, length: jax.Array | None = None) -> jax.Array:
    return decoder.hidden_states(x, length)


@jax.jit
def plain_log_probs(decoder: Any, tokens: jax.Array) -> jax.Array:
    """Log-probabilities `[B, L, V]` after each token, without any memory."""
    return jax.nn.log_softmax(decoder.unembed(decoder.hidden_states(decoder.embed_tokens(tokens))))


@jax.jit
def predictors(made: MemGen, tokens: jax.Array, plan: memgen.Plan) -> jax.Array:
    return made.predictors(tokens, plan)


@jax.jit
def forced_log_probs(made: MemGen, tokens: jax.Array, plan: memgen.Plan) -> jax.Array:
    """Of each token, `[B, L]`, by the forward pass of training."""
    hidden = made.predictors(tokens, plan)
    return memgen.token_log_probs(made.reasoner, hidden, tokens, jnp.ones(tokens.shape, bool))


def replaced(module: Any, **parts: Any) -> Any:
    """The module with other parts, itself unchanged."""
    leaves, structure = jax.tree.flatten(module)
    copy = jax.tree.unflatten(structure, leaves)
    for name, part in parts.items():
        setattr(copy, name, part)
    return copy


PROMPTS = [[1, 2, 3], [9], [int(i) for i in np.random.default_rng(1).integers(0, VOCAB, 37)]]
NEW = 12


NOBODY = (VOCAB,)  # a stop id that is never said: generation with and without is one program


def answer(made: MemGen, prompts: Any = PROMPTS, new: int = NEW, **how: Any) -> memgen.Response:
    """`generate`; its greedy programs are shared, also by what stops."""
    return memgen.generate(made, prompts, new, **{"stop": NOBODY, **how})


def in_numpy(tree: Any) -> Any:
    """To look at parts of it without a program for each."""
    return jax.tree.map(np.asarray, tree)


@functools.cache
def rollout(kind: str, config: MemGenConfig, policy: Any, weaver_width: int | None = None):
    """One greedy generation that many tests look at."""
    made = memgen_of(kind, config, weaver_width)
    return made, answer(made, policy=policy)


SEEN = np.array([[5, 6, 7, 8], [11, 0, 0, 0], [21, 22, 0, 0]], np.int32)
SEEN_LENGTH = np.array([4, 1, 2], np.int32)


class Conversation(NamedTuple):
    """Of each row its two responses; what came before the second; all events and the whole text.

    Attributes:
        start: `[2, B]`, where the responses begin in the text.
        tokens: `[B, L]`, padded on the right by at least one token.
    """

    first: memgen.Response
    second: memgen.Response
    session: Any
    texts: list[list[int]]
    start: np.ndarray
    plan: memgen.Plan
    tokens: np.ndarray


@functools.cache
def conversation(kind: str = "shallow", observed: bytes = b"") -> Conversation:
    """Prompts, a response, an observation, another response, in one session that is kept.

    The session is of the size that `rollout` has, so that both are one program: there is room for
    all of it.

    Args:
        observed: the first observed token of each row, if it is to be another.
    """
    made, seen = memgen_of(kind), SEEN.copy()
    if observed:
        seen[:, 0] = list(observed)
    tokens, length = pad_prompts(PROMPTS, VOCAB)
    request = memgen.make_request(made, NEW, stop=NOBODY)
    keys, most = row_keys(0, PROMPTS), tokens.shape[1] + bucket(NEW)
    session = memgen.begin(made, tokens, length, keys, most)
    first, session = memgen.respond(made, session, request, bucket(NEW))
    session = memgen.observe(made, session, jnp.asarray(seen), jnp.asarray(SEEN_LENGTH))
    second, session = memgen.respond(made, session, request, bucket(NEW))
    texts = [
        [*prompt, *new, *seen[row, : SEEN_LENGTH[row]].tolist()]
        for row, (prompt, new) in enumerate(zip(PROMPTS, first.texts, strict=True))
    ]
    start = np.stack([length, np.asarray(length) + NEW + SEEN_LENGTH])
    plans = [
        memgen.plan_from_decisions(part.decisions, jnp.asarray(at), made.config)
        for part, at in zip((first, second), start, strict=True)
    ]
    point, kinds = (
        np.concatenate([getattr(plan, name) for plan in plans], axis=1)
        for name in ("point", "kind")
    )
    plan = memgen.Plan.of(jnp.asarray(point), jnp.asarray(kinds), made.config)
    whole, _ = whole_rows(texts, second)
    return Conversation(first, second, session, texts, start, plan, np.pad(whole, ((0, 0), (0, 1))))


def whole_rows(prompts: Any, response: memgen.Response) -> tuple[jax.Array, jax.Array]:
    """Prompt and response in one row each, padded on the right `[B, L]`, and prompt lengths."""
    rows = [[*prompt, *new] for prompt, new in zip(prompts, response.texts, strict=True)]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return jnp.asarray(tokens), jnp.asarray(np.array([len(prompt) for prompt in prompts], np.int32))
