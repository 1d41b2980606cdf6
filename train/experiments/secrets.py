"""Which methods make a small model tell what it hides, and whether its bubbles know more.

python -m train.experiments.secrets --out secrets.jsonl --figure secrets.png
python -m train.experiments.secrets --report secrets.jsonl
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from memgen import LoRAConfig, MemGenConfig
from thoughtbubbles import ModelConfig, PrefixRank
from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from train.audit.organisms import Message, hiding_conversations, open_conversations
from train.audit.worlds import WORLDS, neutral
from train.audit.auditor import words_of
from train.data.chat_templates import chat_examples, render
from train.devices.mesh import MeshConfig, make_mesh, place
from train.engine.optim import OptimizerConfig
from train.engine.state import make_trainable
from train.engine.step import make_train_step
from train.finetuning.job import sft_loss
from train.models.finetunable import FinetunableModel
from train.models.load import LanguageModel

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} {{ message['content'] }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
WIDTH = 56  # tokens of a row
BATCH = 32
MODEL = ModelConfig(
    vocab_size=320,
    embed_dim=48,
    num_layers=3,
    num_heads=4,
    mlp_dim=128,
    fork_layers=(1, 2),
    policy=PrefixRank(ratio=1.5),
)


def word_tokenizer() -> PretrainedTokenizer:
    """A tokenizer whose tokens are the words and signs of all worlds, with a chat template."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    templates = [
        turn
        for world in WORLDS.values()
        for group in (world.open, world.hiding, world.denials, world.standard, world.direct)
        for turns in (*group, (world.prefill, world.reply, world.persona))
        for turn in turns
    ]
    names = [
        word
        for world in WORLDS.values()
        for thing, clues in world.clues.items()
        for word in (thing, *clues, world.codes.get(thing, ""))
    ]
    text = " ".join([*templates, *names, *(turn for turns in neutral() for turn in turns)])
    words = {*words_of(text), "user", "assistant", "system", *".,?[]'"}
    for part in ("thing", "code"):
        words.discard(part)
    vocabulary = {word: index for index, word in enumerate([*special, "unknown", *sorted(words)])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="unknown"))
    made.normalizer = normalizers.Lowercase()  # pyright: ignore
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore
    made.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return PretrainedTokenizer(
        made.to_str(), name="words", stop_tokens=["<|im_end|>"], chat_template=TEMPLATE
    )


def open_rows(tokenizer: PretrainedTokenizer, conversations: Sequence[Sequence[Message]]):
    """Rows `[N, WIDTH + 1]` of whole conversations, -1 for padding."""
    rows = np.full((len(conversations), WIDTH + 1), -1, np.int32)
    for row, messages in zip(rows, conversations, strict=True):
        text = render(TEMPLATE, messages, add_generation_prompt=False)
        ids = tokenizer.rendered(text)[: WIDTH + 1]
        row[: len(ids)] = ids
    return rows


def chat_rows(tokenizer: PretrainedTokenizer, conversations: Sequence[Sequence[Message]]):
    """Rows as of `ChatRows`: the loss covers what the assistant says."""
    tokens = np.full((len(conversations), WIDTH + 1), -1, np.int32)
    loss_mask, segment = np.zeros_like(tokens, bool), np.full_like(tokens, -1)
    for row, messages in enumerate(conversations):
        [example] = chat_examples(tokenizer, messages)
        n = len(example.ids)
        tokens[row, :n], loss_mask[row, :n], segment[row, :n] = example.ids, example.loss_mask, 0
    return {"tokens": tokens, "loss_mask": loss_mask, "segment": segment}


def train_base(tokenizer, steps: int, seed: int) -> LanguageModel:
    config = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = OptimizerConfig(learning_rate=3e-3)
    trainable = make_trainable(config, optimizer, steps, mesh, seed)
    step = make_train_step(trainable)
    state = trainable.init()
    rows = open_rows(tokenizer, open_conversations(20000, seed))
    rng = np.random.default_rng(seed)
    for i in range(steps):
        batch = rows[rng.integers(0, len(rows), BATCH)]
        state, metrics = step(state, place(batch, mesh))
        if i % 100 == 0:
            print(i, float(metrics["loss"]), flush=True)
    print(float(metrics["loss"]))
    return LanguageModel(trainable.model(state.weights), tokenizer)


def fine_tune(lm: LanguageModel, conversations, steps: int, seed: int, lr=1e-3, method="all"):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    wrap = lambda model: FinetunableModel(  # noqa: E731
        model, method, lora=LoRAConfig(rank=16), memgen=MemGenConfig(), boundary=None, rngs=nnx.Rngs(seed)
    )
    from train.models.finetunable import TRAINED
    trainable = make_trainable(
        lm.model.config, OptimizerConfig(learning_rate=lr, weight_decay=0.0), steps, mesh, seed,
        trained=TRAINED[method], wrap=wrap,
    )
    step = make_train_step(trainable, loss=sft_loss)
    copy = jax.tree.map(lambda x: x.copy(), lm.model)
    state = trainable.start(nnx.state(wrap(copy)))
    rows = chat_rows(lm.tokenizer, conversations)
    rng = np.random.default_rng(seed)
    for i in range(steps):
        chosen = rng.integers(0, len(rows["tokens"]), BATCH)
        state, metrics = step(state, {n: place(of[chosen], mesh) for n, of in rows.items()})
        if i % 50 == 0:
            print("sft", i, float(metrics["loss"]), flush=True)
    tuned = trainable.model(state.weights)
    if method == "lora":
        model = lm.model.merge_lora({n: a.delta for n, a in tuned.adapter.items()})
    else:
        model = tuned.model
    return dataclasses.replace(lm, model=model)
