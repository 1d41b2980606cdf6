"""The audit commands that read a model from inside, on a small model of bytes that forks."""

import dataclasses
import itertools
import json
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from memgen_tiny import CONFIG
from tiny import SMALL, quick_model

from memgen import MemGen, Plan
from thoughtbubbles import Thoughtbubbles
from thoughtbubbles.lens import TunedLens, embedding_similarity, logit_lens
from thoughtbubbles.pages import Guess, lens_page
from thoughtbubbles.sites import Activation
from train.audit import __main__ as audit
from train.audit import lens, train_sae, tuned_lens
from train.audit.latents import woven_rows
from train.audit.sae import SparseAutoencoder
from train.data import ByteTokenizer
from train.models.load import LanguageModel

BYTES = dataclasses.replace(SMALL, vocab_size=260, merge="residual", fork_layers=(1,))


@pytest.fixture
def lm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LanguageModel:
    found = LanguageModel(quick_model(BYTES), ByteTokenizer())
    for module in (lens, train_sae, tuned_lens):
        monkeypatch.setattr(module, "load_named", lambda checkpoint, model: found)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for index in range(8):
        text = "\n".join(f"line {(7 * index + at) % 23} of a text" for at in range(30))
        (tmp_path / f"{index}.txt").write_text(text, encoding="utf-8")
    return found


def test_a_lens_page_and_its_table(lm, tmp_path, capsys):
    text = "<b>a</b>"
    page = tmp_path / "lens.html"
    lens.main(lens.LensConfig(model="tiny", text=text, watch=("b",), top=3, page=str(page)))
    said = capsys.readouterr().out
    assert said.count("b ('b'): rank") == len(lm.model.sites) and "forks add" in said
    html = page.read_text(encoding="utf-8")
    assert "<script" not in html and "<b>a" not in html and "src=" not in html
    assert "nats to its parent" in html and "fork of depth 1" in html and "block_1" in html
    with pytest.raises(ValueError, match="no site 'block_7' here"):
        lens.read_text(lm, text, sites=("block_7",))


def test_a_word_is_watched_by_its_own_first_token(lm):
    """Bytes have a token for the space in front of a word, which is no part of it."""
    for word, label in (("self", "self ('s', the first of 4 tokens)"), ("b", "b ('b')")):
        id_, shown = lens.watched_token(lm, word)
        assert lm.tokenizer.decode([id_]) == word[0] and shown == label
    with pytest.raises(ValueError, match="watch='' has no token"):
        lens.watched_token(lm, "")


def test_a_page_escapes_texts():
    guess = Guess("<&>", 2.0, ["'<x>'"])
    body = lens_page("t", "<note>", ["<tok>"], ["a<b"], [[guess]]).body
    assert "<tok>" not in body and "<note>" not in body and "<x>" not in body and "a<b" not in body
    assert "&lt;&amp;&gt;" in body and "--p:1.000" in body


def test_a_tuned_lens_comes_nearer_and_is_read_again(lm, tmp_path, capsys):
    out = tmp_path / "lens"
    config = tuned_lens.TunedLensConfig(
        model="tiny", corpus=str(tmp_path), seq_len=6, batch_size=2, steps=40,
        learning_rate=0.01, held_out=2, out=str(out),
    )  # fmt: skip
    tuned_lens.main(config)
    shown = [line.split() for line in capsys.readouterr().out.splitlines() if "step" in line]
    assert [int(words[1]) for words in shown] == list(range(4, 41, 4))
    assert 0 < float(shown[-1][-1]) < 0.9 * float(shown[0][-1])
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert list(metrics) == list(lm.model.sites[:-1])
    for values in metrics.values():
        assert 0 < values["tuned_lens"] < 0.9 * values["logit_lens"]
    found = tuned_lens.load_tuned_lens(out, lm.model)
    assert found.weight.shape == (3, 16, 16) and np.abs(found.weight).max() > 0
    other = quick_model(dataclasses.replace(SMALL, fork_layers=()))
    with pytest.raises(ValueError, match="a lens of 3 sites of width 16, the model has 2 of 16"):
        tuned_lens.load_tuned_lens(out, other)
    with pytest.raises(ValueError, match="holds tuned lens, no sparse autoencoder"):
        train_sae.load_sae(out)
    with pytest.raises(ValueError, match="exists and is not empty: choose another --out"):
        tuned_lens.main(config)


def test_an_autoencoder_of_a_site(lm, tmp_path, capsys):
    out = tmp_path / "sae"
    config = train_sae.SAEConfig(
        model="tiny", corpus=str(tmp_path), seq_len=6, rows=2, site="block_1", streams="forks",
        features=48, k=4, tokens=8000, batch_size=64, buffer=512, learning_rate=0.01,
        held_out=2, out=str(out),
    )  # fmt: skip
    train_sae.main(config)
    sae, density, meta = train_sae.load_sae(out)
    metrics = meta["metrics"]
    assert meta["site"] == "block_1" and meta["streams"] == "forks" and sae.k == 4
    assert 0 < metrics["fvu"] < 0.5 and 0 < metrics["l0"] <= 4 and metrics["dead"] < 1
    assert metrics["loss"] != metrics["loss_sae"] != metrics["loss_zero"]
    expected = (metrics["loss_zero"] - metrics["loss_sae"]) / (
        metrics["loss_zero"] - metrics["loss"]
    )
    np.testing.assert_allclose(metrics["loss_recovered"], expected, rtol=1e-5)
    np.testing.assert_allclose(density.sum(), metrics["l0"], rtol=1e-5)
    lines = (out / "features.jsonl").read_text(encoding="utf-8").splitlines()
    features = [json.loads(line) for line in lines]
    assert features[0]["density"] == pytest.approx(density.max())
    assert all(len(feature["tokens"]) == 20 and feature["examples"] for feature in features)


def test_dead_features_are_revived_within_the_training():
    config = train_sae.SAEConfig(model="tiny")
    assert train_sae.dead_after(config) == config.tokens // 10
    few = dataclasses.replace(config, tokens=50_000)
    assert train_sae.dead_after(few) == 10 * few.batch_size
    assert train_sae.dead_after(dataclasses.replace(few, dead_after=7)) == 7
    with pytest.raises(ValueError, match="dead_after=50000 of tokens=50000: no feature would"):
        dataclasses.replace(few, dead_after=50_000)
    dataclasses.replace(few, dead_after=50_000, aux_weight=0.0)


def test_an_identity_recovers_the_loss_and_a_silent_autoencoder_none():
    """Features that are the positive and negative coordinates; then without their decoder."""
    config = dataclasses.replace(BYTES, fork_layers=(), num_layers=1)
    lm = LanguageModel(quick_model(config), ByteTokenizer())
    eye = jnp.eye(16)
    encoder = jnp.concatenate([eye, -eye], axis=1)
    both = SparseAutoencoder(encoder, jnp.zeros(32), encoder.T, jnp.zeros(16), jnp.float32(2), 16)
    silent = dataclasses.replace(both, decoder=0 * both.decoder)
    rows = [np.random.default_rng(0).integers(0, 256, (2, 7)).astype(np.int32)]
    for sae, recovered in ((both, 1.0), (silent, 0.0)):
        found = train_sae.loss_recovered(sae, lm, rows, "block_0", "all")
        assert found["loss_recovered"] == pytest.approx(recovered, abs=1e-3)


def test_activations_that_are_all_equal_are_one_line(lm, monkeypatch):
    same = itertools.repeat(np.ones((64, 16), np.float32))
    monkeypatch.setattr(train_sae, "activations", lambda *_: same)
    config = train_sae.SAEConfig(
        model="tiny", features=8, k=2, tokens=128, batch_size=64, buffer=128
    )
    with pytest.raises(ValueError, match="the 64 activations of step 1 are all equal"):
        train_sae.train(config, lm, None, "block_1")  # pyright: ignore


def test_a_weak_feature_has_its_texts_too():
    """However many larger values the other features have in the same rows."""
    count = 300
    value = np.stack([10.0 + np.arange(count), 1 + np.arange(count) / count], axis=1)
    index = np.tile(np.arange(2), (count, 1))
    where = np.stack([np.zeros(count, int), np.arange(count)], axis=1)
    token, rows = np.arange(count)[None], np.full((1, count), ord("a"))
    lm: Any = types.SimpleNamespace(tokenizer=ByteTokenizer())
    best: list[list[tuple[float, str]]] = [[], [], []]
    train_sae._keep_best(best, value, index, where, token, rows, lm)
    assert [[of for of, _ in texts] for texts in best] == [
        value[: -train_sae.EXAMPLES - 1 : -1, feature].tolist() for feature in range(2)
    ] + [[]]


def test_neurons_need_no_autoencoder(lm, monkeypatch, tmp_path):
    hatchling = types.SimpleNamespace(sites=("embed", "block_0"), neuron_sites=("y_0",))
    monkeypatch.setattr(train_sae, "check_site", lambda lm, site: site)
    monkeypatch.setattr(train_sae, "load_named", lambda *_: types.SimpleNamespace(model=hatchling))
    with pytest.raises(ValueError, match="site='y_0': neurons are sparse and positive already"):
        train_sae.main(train_sae.SAEConfig(model="tiny", site="y_0", out=str(tmp_path / "a")))


def test_a_tuned_lens_holds_the_logits_of_one_site_at_a_time():
    """Eight sites of 4096 tokens; with the logits of the model, a gradient needs a few of them."""
    config = dataclasses.replace(
        SMALL, vocab_size=4096, fork_layers=(), num_layers=8, scan_layers=True
    )
    model = jax.eval_shape(lambda: Thoughtbubbles(config, rngs=nnx.Rngs(0)))
    sites = tuple(f"block_{i}" for i in range(8))
    tokens = jax.ShapeDtypeStruct((2, 32), jnp.int32)

    def loss(lens, model, tokens):
        return tuned_lens.divergences(model, lens, tokens, jnp.ones(tokens.shape, bool)).sum()

    lens = TunedLens.identity(sites, 16)
    compiled = jax.jit(jax.grad(loss)).lower(lens, model, tokens).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 6 * 2 * 32 * 4096 * 4


def test_streams_are_chosen_by_depth_without_first_tokens():
    alive, token = np.array([[1, 1, 1, 1, 0]], bool), np.array([[0, 1, 1, 1, 0]])
    found = Activation(token, alive, 0 * token, np.array([[0, 2, 1, 0, 0]]), token - 1, token)
    for streams, slots in (("all", [1, 2, 3]), ("roots", [3]), ("forks", [1, 2])):
        assert train_sae.selected(found, streams)[0].nonzero()[0].tolist() == slots


def test_latents_are_read_between_tokens():
    """Rows with memory: cosines of latents to embeddings, and the lens of the reasoner."""
    reasoner = quick_model(dataclasses.replace(SMALL, fork_layers=()))
    boundary = np.zeros(reasoner.vocab_size, np.uint8)
    config = dataclasses.replace(CONFIG, trigger=None)
    memgen = MemGen(reasoner.backbone(), config, boundary=boundary, rngs=nnx.Rngs(0))
    tokens = jnp.array([[1, 2, 3, 4], [5, 6, 7, 8]], jnp.int32)
    plan = Plan.of(jnp.array([[2], [-1]]), jnp.zeros((2, 1), jnp.int32), config)

    @jax.jit
    def read(memgen) -> Any:
        rows = woven_rows(memgen, tokens, plan)
        lenses = (logit_lens, embedding_similarity)
        readings = [of(rows.model, rows.inputs_embeds, rows.mask, top=17) for of in lenses]
        hidden = memgen.reasoner.hidden_states(rows.inputs_embeds, rows.mask.sum(axis=1))
        log_probs = jax.nn.log_softmax(memgen.reasoner.unembed(hidden))
        return rows.inputs_embeds, rows.mask, rows.latent, readings, log_probs

    stream, mask, latent, (logits, cosines), log_probs = jax.device_get(read(memgen))
    assert latent[0].nonzero()[0].tolist() == [2, 3, 4] and not latent[1].any()
    assert mask.sum(axis=1).tolist() == [7, 4]
    order = np.argsort(logits["block_1"].tokens.ids, axis=-1)
    found = np.take_along_axis(logits["block_1"].tokens.value, order, axis=-1)
    np.testing.assert_allclose(found[mask], log_probs[mask], atol=1e-5)
    table = np.asarray(reasoner.embed_tokens(jnp.arange(17)))
    x = stream[latent]
    cosine = (x @ table.T) / np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(table, axis=1))
    np.testing.assert_allclose(
        cosines["embed"].tokens.value[latent], -np.sort(-cosine, axis=1), atol=1e-5
    )


def test_a_mistake_is_one_line(lm, capsys, monkeypatch):
    sae = SparseAutoencoder(*map(jnp.zeros, ((8, 4), (4,), (4, 8), (8,))), jnp.float32(1), 2)
    with pytest.raises(ValueError, match="of width 8 for activations of width 16"):
        sae.features(jnp.zeros((1, 16)))
    with pytest.raises(ValueError, match="this model has no corpus of its own, pass --corpus"):
        train_sae.main(train_sae.SAEConfig(model="tiny", out="nowhere"))
    with pytest.raises(ValueError, match="buffer=100 can't shuffle batches of 64"):
        train_sae.SAEConfig(model="tiny", batch_size=64, buffer=100)
    with pytest.raises(ValueError, match="learning_rate=0: choose more than 0"):
        train_sae.SAEConfig(model="tiny", learning_rate=0)  # not the default
    monkeypatch.setattr("sys.argv", ["thoughtbubbles audit", "lense"])
    with pytest.raises(SystemExit):
        audit.command()
    assert "unknown audit 'lense': choose one of lens, tuned-lens" in capsys.readouterr().err
