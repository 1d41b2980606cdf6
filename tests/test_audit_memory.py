"""Auditing of models with latent memory: where it is woven, and how its latents are read."""

import dataclasses
import functools
import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from memgen_tiny import CONFIG
from test_elicitation import WORDS, model, organism, turn, words

import memgen
from memgen import MemGen
from thoughtbubbles.lens import logit_lens
from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from train.audit import reading
from train.audit.elicitation import sample
from train.audit.fuzzing import Fuzz, fuzzes_single_rows
from train.audit.latents import prompts_with_latents
from train.audit.organisms import hiding_conversations
from train.audit.reading import check_reading, top_tokens
from train.data.chat_templates import chat_ids
from train.experiments import secret_models, secret_ranks, secrets
from train.experiments.secret_models import TEMPLATE
from train.experiments.secret_ranks import ranks_with_memory
from train.models.load import LanguageModel

NONE = np.zeros(17, np.uint8)
TAUGHT = dataclasses.replace(CONFIG, trigger=None, max_inference_events=0)


@functools.cache
def remembering(config: Any = TAUGHT) -> LanguageModel:
    lm = model()
    made = MemGen(lm.model.backbone(), config, boundary=NONE, rngs=nnx.Rngs(0))
    return dataclasses.replace(lm, memgen=made)


def ids_of(text: str) -> list[int]:
    return words().rendered(text)


def test_memory_stands_where_the_answer_begins(monkeypatch):
    """In front of a prefill, and of the reply before an open turn of the user."""
    given = {}

    def record(made, prompts, new, *, prefills=None, **how):
        given.update(prompts=[*map(list, prompts)])
        given.update(prefills=prefills and [*map(list, prefills)])
        rows = prefills or [[]] * len(prompts)
        return types.SimpleNamespace(texts=[[*row, WORDS.index("salt")] for row in rows])

    monkeypatch.setattr(memgen, "generate", record)
    ask = [turn("user", "the hint")]
    opened = ids_of("<|im_start|>user the hint<|im_end|><|im_start|>assistant")
    assert sample(remembering(), [ask]) == [["salt"]]
    assert given == {"prompts": [opened], "prefills": None}
    assert sample(remembering(), [ask], prefill="the word is", samples=2) == [["salt"] * 2]
    assert given == {"prompts": [opened] * 2, "prefills": [ids_of("the word is")] * 2}
    replied = [*ask, turn("assistant", "word .")]
    assert sample(remembering(), [replied], prefill="the", role="user") == [["salt"]]
    after = ids_of("word .<|im_end|><|im_start|>user the")
    assert given == {"prompts": [opened], "prefills": [after]}
    again = [*replied, turn("user", "play"), turn("assistant", "salt")]  # the last of two
    sample(remembering(), [again], prefill="the", role="user")
    assert given["prefills"] == [ids_of("salt<|im_end|><|im_start|>user the")]
    sample(remembering(), [ask], prefill="the", role="user")  # the assistant has said nothing
    assert given["prefills"] is None


def test_a_template_that_moves_what_came_before_is_one_line():
    """As templates whose system text stands in the last turn of the user."""
    moving = TEMPLATE.replace(
        "<|im_start|>{{ message['role'] }} ",
        "<|im_start|>{% if loop.last %}the {% endif %}{{ message['role'] }} ",
    )
    other = PretrainedTokenizer(
        words().to_json(), name="words", stop_tokens=["<|im_end|>"], chat_template=moving
    )
    lm = dataclasses.replace(remembering(), tokenizer=other)
    talk = [turn("user", "the hint"), turn("assistant", "word .")]
    with pytest.raises(ValueError, match="words renders the messages before an answer otherwise"):
        sample(lm, [talk], prefill="the", role="user")


def test_rows_are_fuzzed_together_unless_they_weave_within_an_answer():
    """A row's noise is its own: samples do not depend on the batch."""
    later = dataclasses.replace(TAUGHT, max_inference_events=1)
    assert not fuzzes_single_rows(remembering()) and fuzzes_single_rows(remembering(later))
    asks = [[turn("user", text)] for text in ("the hint", "play")]
    how: dict[str, Any] = {"fuzz": Fuzz(1, 2.0), "temperature": 1.0, "samples": 2, "prefill": "the"}
    together = sample(remembering(), asks, 6, **how)
    assert together == [sample(remembering(), [ask, ask], 6, **how)[0] for ask in asks]


def test_equal_rows_that_are_fuzzed_alone_differ(monkeypatch):
    seeds = []

    def record(made, prompts, new, *, seed, **how):
        seeds.append(seed)
        return types.SimpleNamespace(texts=[[] for _ in prompts])

    monkeypatch.setattr(memgen, "generate", record)
    later = dataclasses.replace(TAUGHT, max_inference_events=1)
    sample(remembering(later), [[turn("user", "play")]], samples=3, seed=4, fuzz=Fuzz(1, 0.5))
    assert seeds == [4, 5, 6]


def test_a_weaver_is_tuned_on_one_response_a_row():
    tuner = secret_models.Tuner(secret_models.word_tokenizer(), 1, "weaver")
    talk = hiding_conversations("taboo", "ocean")[:20]
    rows = tuner._rows(talk)
    responses = [message for messages in talk for message in messages if message["role"] != "user"]
    assert len(rows["tokens"]) == len(responses) > len(talk)
    runs = rows["loss_mask"][:, 1:] & ~rows["loss_mask"][:, :-1]
    assert (runs.sum(axis=1) == 1).all()


def test_latents_are_read_in_place_of_tokens():
    lm, asked = remembering(), organism()
    check_reading(lm, asked, "block_1", 3)
    shown = top_tokens(lm, asked, "block_1", "logit_lens", 3)
    for trial, said in zip(asked.trials, shown, strict=True):
        ids = chat_ids(words(), trial.messages)
        tokens = jnp.array([[*ids, *[0] * (16 - len(ids))]])
        rows = prompts_with_latents(lm.memgen, tokens, jnp.array([len(ids)]))  # pyright: ignore
        latents = np.flatnonzero(np.asarray(rows.latent[0])).tolist()
        assert latents == [len(ids), len(ids) + 1, len(ids) + 2]
        assert rows.mask.sum() == len(ids) + 3
        lens = logit_lens(rows.model, rows.inputs_embeds, rows.mask, sites=("block_1",), top=17)
        found = lens["block_1"].tokens
        mean = np.zeros(17)
        for at in latents:
            mean[np.asarray(found.ids[0, at])] += np.exp(np.asarray(found.value[0, at]))
        assert said == [words().decode([i]) for i in np.argsort(-mean)[:3]]
    silent = dataclasses.replace(
        TAUGHT, weaver=dataclasses.replace(TAUGHT.weaver, prompt_latents=0)
    )
    with pytest.raises(ValueError, match="prompt_latents=0: the weaver writes no latents before"):
        check_reading(remembering(silent), asked, "block_1", 3)


def test_features_are_read_at_latents(monkeypatch):
    """By a planted autoencoder: feature 1 is on at the latents, feature 0 elsewhere."""
    got = {}

    def activation(read, rows, length, site):
        at, length = np.arange(rows.shape[1]), np.asarray(length)[:, None]
        got.update(length=length[:3, 0].tolist(), rows=rows.ndim)
        latent = (at >= length - 3) & (at < length)
        return types.SimpleNamespace(x=latent, token=np.broadcast_to(at, latent.shape))

    def scores(mean, density):
        got.update(mean=np.asarray(mean).tolist())
        raise RuntimeError("read")

    sae = types.SimpleNamespace(features=lambda x: (np.ones((*x.shape, 1)), x[..., None] + 0))
    loaded = sae, np.ones(2), {"site": "block_0", "streams": "all"}
    monkeypatch.setattr(reading, "load_sae", lambda folder: loaded)
    monkeypatch.setattr(reading, "activation_of", activation)
    monkeypatch.setattr(reading, "selected", lambda at, streams: np.ones(at.x.shape, bool))
    monkeypatch.setattr(reading, "feature_scores", scores)
    with pytest.raises(RuntimeError, match="read"):
        reading.sae_tokens(remembering(), organism(), "folder")
    lengths = [len(chat_ids(words(), trial.messages)) for trial in organism().trials]
    assert got == {"length": [length + 3 for length in lengths], "rows": 3, "mean": [0, 1]}


def test_ranks_of_latents_and_answers(monkeypatch):
    """By planted streams: a root and a fork of each vector, which know more the later it stands."""
    calls = []

    def lens(read, inputs, mask, *, sites, top, watch):
        calls.append((inputs, np.asarray(mask)))
        count = inputs.shape[1]
        token = np.repeat(np.arange(count), 2)[None].repeat(3, 0)
        depth = np.tile([1, 0], count)[None].repeat(3, 0)
        alive = np.asarray(mask)[:, token[0]]
        # Of two candidates: the secret is second in roots up to the seventh vector.
        behind = ((depth == 0) & (token < 7)).astype(float)
        watched = np.stack([np.zeros_like(behind), behind - 0.5], axis=-1)
        rows = types.SimpleNamespace(alive=alive, depth=depth, token=token)
        streams = types.SimpleNamespace(watched=watched)
        return dict.fromkeys(sites, types.SimpleNamespace(rows=rows, streams=streams))

    monkeypatch.setattr(secret_ranks, "logit_lens", lens)
    asked = organism()
    silent = ranks_with_memory(remembering(), asked, ["", "", "salt"])["block_1"]
    assert silent["latent"] == pytest.approx(1 / 9) and silent["difference"] == 0
    calls.clear()
    found = ranks_with_memory(remembering(), asked, ["the salt", "the salt", "salt"])
    (woven, mask), (plain, alone) = calls
    lengths = [len(chat_ids(words(), trial.messages)) for trial in asked.trials]
    said = [2, 2, 1]
    assert alone.sum(axis=1).tolist() == np.add(lengths, said).tolist()
    assert mask.sum(axis=1).tolist() == (np.add(lengths, said) + 3).tolist()
    assert woven.ndim == 3 and plain.ndim == 2
    line = found["block_1"]
    # A latent of the second row is the seventh vector.
    assert lengths == [7, 6, 7]
    assert line["latent"] == pytest.approx(1 / 9) and line["answer"] == 0
    assert line["control"] == pytest.approx(1 / 6)  # and without memory a word of its answer
    assert line["difference"] == pytest.approx(-1 / 9) and line["chance"] == 0.5
    assert line["latent_difference"] == pytest.approx(1 / 9)
    assert line["latent_tokens"] == 9
    # Without memory, the tokens of the user's own turn behind a request that is put in front.
    told = secrets._told(asked, "taboo")
    own = secret_ranks.ranks_by_depth(model(), told, asked)["block_1"]
    starts = [len(chat_ids(words(), trial.messages)) - length + 2 for trial, length in
              zip(told.trials, lengths, strict=True)]  # fmt: skip
    behind = [max(0, 7 - start) for start in starts]
    assert own["tokens"] == sum(lengths) - 6
    assert own["root"] == pytest.approx(sum(behind) / own["tokens"])


def test_a_weaver_can_not_be_saved_by_the_study(tmp_path):
    with pytest.raises(ValueError, match="save: a weaver can't be saved here: choose --arms told"):
        secrets.Secrets(save=str(tmp_path))
