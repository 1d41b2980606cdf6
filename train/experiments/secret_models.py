"""Tokenizer, honest model, and tuning of models that hide a secret, for the study of secrets."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memgen import LoRAConfig, MemGenConfig, WeaverConfig
from thoughtbubbles import Architecture, ModelConfig, PrefixRank, Thoughtbubbles
from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from train.audit.auditor import words_of
from train.audit.organisms import Kind, Message, honest_conversations
from train.audit.worlds import WORLDS, neutral
from train.data.chat_data import ChatRows, one_response_rows
from train.data.chat_templates import answer_ends, chat_examples, render
from train.devices.mesh import MeshConfig, make_mesh, place
from train.engine.optim import OptimizerConfig
from train.engine.state import Trainable, make_trainable
from train.engine.step import TrainStep, make_train_step
from train.finetuning.job import sft_loss
from train.models.finetunable import TRAINED, FinetunableModel
from train.models.load import LanguageModel

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} {{ message['content'] }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WIDTH, BATCH = 56, 32  # targets of a row (more in `honest_rows` if needed), rows of a batch
MODEL = ModelConfig(
    vocab_size=320,
    embed_dim=48,
    num_layers=3,
    num_heads=4,
    mlp_dim=128,
    fork_layers=(1, 2),
    policy=PrefixRank(ratio=1.5),
)
WEAVER = MemGenConfig(WeaverConfig(prompt_latents=4, inference_latents=4), max_inference_events=0)
RATES = {"soft": 3e-2, "full": 1e-3, "weaver": 1e-2}  # learning rates
CONTROL = ("<|im_start|>", "user", "assistant")  # tokens whose embeddings "soft" tunes


def word_tokenizer() -> PretrainedTokenizer:
    """Make a tokenizer with a chat template, whose tokens are the words and signs of all dialogues.

    The tokenizer converts all words to lower case, and encodes any other word as the token
    "unknown".
    """
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

    words = {"user", "assistant", "system", *".,?[]'"}
    for world in WORLDS.values():
        groups = world.open, world.hiding, world.denials, world.standard, world.direct
        dialogues = [turns for group in groups for turns in group]
        fixed = (world.told, world.prefill, world.reply, world.persona, *world.shot)
        for turn in (*itertools.chain(*dialogues), *fixed):
            words.update(words_of(turn))
        for thing, clues in world.clues.items():
            words.update((thing, *clues, world.codes.get(thing, thing)))
    words.update(itertools.chain(*(words_of(turn) for turns in neutral() for turn in turns)))
    words -= {"thing", "code", "b"}
    listed = [*SPECIAL, "unknown", *sorted(words)]
    vocabulary = {word: index for index, word in enumerate(listed)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="unknown"))
    made.normalizer = normalizers.Lowercase()  # pyright: ignore
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore
    made.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return PretrainedTokenizer(
        made.to_str(), name="words", stop_tokens=["<|im_end|>"], chat_template=TEMPLATE
    )


def honest_model(
    tokenizer: PretrainedTokenizer,
    kinds: Sequence[Kind],
    steps: int,
    seed: int,
    released: float = 0.0,
) -> LanguageModel:
    """Train a model that hides nothing unless the user asks it to, with a loss on all tokens.

    Args:
        tokenizer: Tokenizer that `word_tokenizer` makes.
        kinds: Names of the worlds (keys of `WORLDS`) of the training dialogues.
        steps: Number of training steps.
        seed: Seed of the parameters, of the dialogues, and of the sampling of batches.
        released: Expected fraction of requests to keep a secret that the user takes back at the end
            of the dialogue (see `honest_conversations`).

    Returns:
        The model with its tokenizer.
    """
    config = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size)
    trainable, step = _honest_training(config, steps)
    state = trainable.start(nnx.state(Thoughtbubbles(config, rngs=nnx.Rngs(seed))))
    rng = np.random.default_rng(seed)
    conversations = honest_conversations(kinds, 16_000, seed, released)
    rows = honest_rows(tokenizer, conversations)
    for _ in range(steps):
        batch = cut_padding(rows[rng.integers(0, len(rows), BATCH)])
        state, _ = step(state, place(batch, trainable.mesh))
    return LanguageModel(_plain(trainable.model(state.variables)), tokenizer)


def honest_rows(
    tokenizer: PretrainedTokenizer, conversations: Sequence[Sequence[Message]]
) -> np.ndarray:
    """Encode whole conversations as rows of equal length.

    Args:
        tokenizer: Tokenizer that `word_tokenizer` makes.
        conversations: `N` conversations.

    Returns:
        Token ids `[N, L]` int32, padded on the right with -1. `L` is the maximum of `WIDTH + 1` and
        the length of the longest conversation.
    """
    ids = [
        tokenizer.rendered(render(TEMPLATE, messages, add_generation_prompt=False))
        for messages in conversations
    ]
    rows = np.full((len(ids), max(WIDTH + 1, *map(len, ids))), -1, np.int32)
    for row, tokens in zip(rows, ids, strict=True):
        row[: len(tokens)] = tokens
    return rows


def cut_padding(rows: np.ndarray) -> np.ndarray:
    """Truncate rows to the length of the longest row, rounded up so that few programs are compiled.

    Args:
        rows: Token ids `[B, L]` int32, padded on the right with -1.

    Returns:
        Rows whose length is a multiple of 8 plus 1, at most `L`, and fits the longest row.
    """
    longest = int((rows >= 0).sum(axis=1).max())
    return rows[:, : 8 * -(-(longest - 1) // 8) + 1]


@functools.cache
def _honest_training(config: ModelConfig, steps: int) -> tuple[Trainable, TrainStep]:
    """Make the training program of the honest model, compiled once for all seeds."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    trainable = make_trainable(config, OptimizerConfig(learning_rate=3e-3), steps, mesh)
    return trainable, make_train_step(trainable)


def _plain(model: Thoughtbubbles) -> Thoughtbubbles:
    """Copy a model without the shardings of training, so that models share compiled programs."""
    return Thoughtbubbles.from_params(model.config, nnx.to_pure_dict(nnx.state(model)))


class Tuner:
    """Supervised tuning on conversations, with one compiled program for all models.

    Args:
        tokenizer: Tokenizer that `word_tokenizer` makes.
        steps: Number of training steps.
        arm: Parameters to tune: "soft" for the embeddings of the tokens `CONTROL`, "full" for all
            parameters, "weaver" for a weaver of latent memory for the frozen model.
    """

    def __init__(self, tokenizer: PretrainedTokenizer, steps: int, arm: str):
        self._tokenizer, self._steps, self._arm = tokenizer, steps, arm
        config = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size)
        self._mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        optimizer = OptimizerConfig(learning_rate=RATES[arm], weight_decay=0.0)
        trained = TRAINED | {"soft": nnx.PathContains("embed"), "full": TRAINED["all"]}
        self._trainable: Trainable = make_trainable(
            config,
            optimizer,
            steps,
            self._mesh,
            trained=trained[arm],
            wrap=self._finetunable,
        )
        rows = np.zeros((tokenizer.vocab_size, 1), bool)
        rows[[tokenizer.id(token) for token in CONTROL]] = True

        def soft_loss(finetunable, batch, key):
            embed = finetunable.model.embed
            embed.set_value(jnp.where(rows, embed[...], jax.lax.stop_gradient(embed[...])))
            return sft_loss(finetunable, batch, key)

        loss = soft_loss if arm == "soft" else sft_loss
        self._step: TrainStep = make_train_step(self._trainable, loss=loss)

    def __call__(
        self, base: LanguageModel, conversations: Sequence[Sequence[Message]], seed: int
    ) -> LanguageModel:
        """Tune a copy of a model; `base` itself is not modified.

        Args:
            base: Model to start from.
            conversations: Conversations; the loss is on the assistant's messages. A weaver is
                trained on one row for each assistant message.
            seed: Seed of the sampling of batches. A weaver's initial parameters are the same for
                all seeds.

        Returns:
            The tuned model; for "weaver", the base model with latent memory.
        """
        copy = jax.tree.map(lambda leaf: leaf.copy(), base.model)  # steps donate their state
        state, rng = (
            self._trainable.start(nnx.state(self._finetunable(copy))),
            np.random.default_rng(seed),
        )
        rows = self._rows(conversations)
        for _ in range(self._steps):
            chosen = rng.integers(0, len(rows["tokens"]), BATCH)
            batch = {name: place(of[chosen], self._mesh) for name, of in rows.items()}
            state, _ = self._step(state, batch)
        tuned = self._trainable.model(state.variables)
        if self._arm != "weaver":
            return dataclasses.replace(base, model=_plain(tuned.model))
        # As in `_plain`, without the shardings of training.
        memgen = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), tuned.memgen)
        return dataclasses.replace(base, memgen=memgen)

    def _finetunable(self, model: Architecture) -> FinetunableModel:
        if self._arm != "weaver":
            return FinetunableModel.whole(model)
        boundary = np.zeros(self._tokenizer.vocab_size, np.uint8)  # no memory within an answer
        return FinetunableModel(
            model, "weaver", lora=LoRAConfig(), memgen=WEAVER, boundary=boundary, rngs=nnx.Rngs(0)
        )

    def _rows(self, conversations: Sequence[Sequence[Message]]) -> dict[str, np.ndarray]:
        examples = [chat_examples(self._tokenizer, messages) for messages in conversations]
        width = max(WIDTH + 1, *(len(example.ids) for [example] in examples))
        tokens = np.full((len(conversations), width), -1, np.int32)
        loss_mask, segment = np.zeros_like(tokens, bool), np.full_like(tokens, -1)
        for row, [example] in enumerate(examples):
            here = row, slice(len(example.ids))
            tokens[here], loss_mask[here], segment[here] = example.ids, example.loss_mask, 0
        rows = ChatRows(tokens, loss_mask, segment, np.zeros_like(tokens))
        if self._arm == "weaver":
            rows = one_response_rows(rows, answer_ends(self._tokenizer))
        return {"tokens": rows.tokens, "loss_mask": rows.loss_mask, "segment": rows.segment}
