"""Texts too long for memory, and bytes that are no text: one line before anything is compiled."""

import dataclasses
import json
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from test_export import bpe
from tiny import SMALL, quick_model

from thoughtbubbles import ModelConfig, PrefixRank, Thoughtbubbles, TopK
from thoughtbubbles.hatchling import Hatchling, HatchlingConfig
from thoughtbubbles.prefill import long_cache
from thoughtbubbles.pretrained import load_pretrained
from train.data import ByteTokenizer
from train.devices import memory
from train.evaluation.scoring import Scorer, score_rows
from train.models import generation, text_memory
from train.models.generation import answer, map_of_text, write
from train.models.load import LanguageModel
from train.models.text_memory import check_text_memory, needed_bytes

LLAMA = Path(__file__).parent / "fixtures/pretrained/llama"
CONFIG = dataclasses.replace(SMALL, vocab_size=260, policy=PrefixRank(2.0))
HATCHLING = HatchlingConfig(260, 16, 64, 2, 2)


@pytest.fixture
def lm() -> LanguageModel:
    return LanguageModel(quick_model(CONFIG), ByteTokenizer())


@pytest.mark.parametrize(
    ("kind", "config", "tokens"),
    [
        (Thoughtbubbles, ModelConfig(64, 32, 1, 4), 2048),
        (Thoughtbubbles, ModelConfig(64, 32, 1, 4), 8192),  # whose blocks are taken in tiles
        (Thoughtbubbles, ModelConfig(64, 32, 2, 4, fork_layers=(1,), policy=PrefixRank(2.0)), 2048),
        (Hatchling, HatchlingConfig(64, 16, 256, 1, 4), 2048),
    ],
    ids=["plain", "plain, long", "forks", "hatchling"],
)
def test_the_estimate_is_what_xla_plans(kind: Any, config: Any, tokens: int):
    model = nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0)))
    rows = jax.ShapeDtypeStruct((2, tokens + 1), jnp.int32)
    start = jax.ShapeDtypeStruct((2,), jnp.int32)
    compiled = score_rows.lower(model, rows, start).compile()
    planned = compiled.memory_analysis().temp_size_in_bytes  # pyright: ignore
    assert 0.6 * planned < needed_bytes(model, 2, tokens) < 1.5 * planned


@pytest.mark.parametrize("config", [CONFIG, HATCHLING], ids=["forks", "hatchling"])
def test_what_is_said_to_fit_fits(config: Any, monkeypatch: pytest.MonkeyPatch):
    kind = Thoughtbubbles if config is CONFIG else Hatchling
    model = nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0)))
    monkeypatch.setattr(text_memory, "free_bytes", lambda: 10**9)
    said = r"3 texts of up to 10,000,000 tokens.* GiB, 953.7 MiB are free: [\d,]+ tokens fit, so sh"
    for cached, new in ((True, 10), (True, 0), (False, 10)):
        if cached and config is HATCHLING:  # read in blocks, and its state does not grow
            check_text_memory(model, 3, 10**7, new, cached)
            continue
        with pytest.raises(ValueError, match=said) as caught:
            check_text_memory(model, 3, 10**7, new, cached)
        fits = int(str(caught.value).split("free: ")[1].split(" tokens")[0].replace(",", ""))
        assert fits > 1000
        if cached:  # block by block: as many as the cache that was made for them
            assert long_cache(fits + new) == fits + new > 100_000
        check_text_memory(model, 3, fits, new, cached)
        with pytest.raises(ValueError, match="shorten them or take fewer at a time"):
            check_text_memory(model, 3, fits + 1, new, cached)
    if config is CONFIG:  # the state of a Hatchling does not grow
        with pytest.raises(ValueError, match="and 1,000,000,000 new ones .*: 0 tokens fit, so add"):
            check_text_memory(model, 1, 5, 10**9)


def test_nothing_is_refused_on_a_device_that_does_not_say_its_memory(lm, monkeypatch):
    device = types.SimpleNamespace(platform="gpu", memory_stats=lambda: None)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert text_memory.free_bytes() is None
    check_text_memory(lm.model, 1, 10**8)


def test_pages_of_files_do_not_count_as_used(lm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A container of 8 GiB that has read large files, on a machine of more."""
    device = types.SimpleNamespace(platform="cpu", memory_stats=lambda: None)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(memory.os, "sysconf", lambda name: 2**26 if "PHYS" in name else 2**12)
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CONTAINER", tmp_path)
    for name, text in {
        "meminfo": f"MemTotal: {2**28} kB\nMemAvailable: {2**26} kB\n\n",
        "memory.max": f"{2**33}\n",
        "memory.current": f"{2**33 - 5 * 2**20}\n",
        "memory.stat": f"anon {2**32}\nfile {2**31}\ninactive_file {2**30}\nactive_file {2**29}\n",
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert memory.host_bytes() == memory.device_bytes(device) == 2**33
    assert memory.free_bytes() == 2**30 + 2**29 + 5 * 2**20
    check_text_memory(lm.model, 1, 100)
    (tmp_path / "memory.stat").write_text("inactive_file 0\nactive_file 0\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"need about [\d.,]+ MiB, 5.0 MiB are free"):
        check_text_memory(lm.model, 1, 30_000)
    (tmp_path / "memory.max").write_text("max\n", encoding="utf-8")
    assert (memory.host_bytes(), memory.free_bytes()) == (2**38, 2**36)
    (tmp_path / "meminfo").unlink()
    assert memory.free_bytes() == 2**38


def test_sizes_are_readable():
    assert memory.size_text(2**30) == "1.0 GiB"
    assert memory.size_text(5 * 2**20) == "5.0 MiB"


def test_a_prompt_too_long_for_memory_is_one_line_at_once(lm, monkeypatch):
    monkeypatch.setattr(text_memory, "free_bytes", lambda: 2**24)
    with pytest.raises(
        ValueError, match="1 text of up to 200,001 tokens and 2 new ones need about"
    ):
        write(lm, ["a" * 200_000], 2)
    with pytest.raises(ValueError, match="1 text of up to 200,001 tokens need about"):
        map_of_text(lm, "a" * 200_000)
    with pytest.raises(ValueError, match="4 texts of up to 262,144 tokens need about"):
        Scorer(lm, 4, quiet=True)([("a" * 200_000, "b")])
    pretrained = load_pretrained(LLAMA)
    chat = LanguageModel(
        Thoughtbubbles.from_params(pretrained.config, pretrained.params), pretrained.tokenizer
    )
    with pytest.raises(ValueError, match="1 text of up to 60,0.. tokens and 3 new ones need about"):
        answer(chat, [" a" * 60_000], 3)


def test_a_policy_that_reads_whole_texts_says_so(lm, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_memory, "free_bytes", lambda: 2**30)
    model = lm.model.with_policy(TopK(2.0))
    said = r"1 text of .* GiB in one pass, as TopK.* among all tokens .*: [\d,]+ tokens fit"
    with pytest.raises(ValueError, match=said):
        check_text_memory(model, 1, 1_000_000, 1, cached=False)


def test_memory_that_runs_out_all_the_same_is_one_line(lm, monkeypatch: pytest.MonkeyPatch):
    def exhausted(*_: Any, **__: Any):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(generation, "generate", exhausted)
    message = "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."
    with pytest.raises(ValueError, match="1 text of up to 5 tokens ran out of memory"):
        write(lm, ["ab"], 2)
    message = "INTERNAL: other"
    with pytest.raises(jax.errors.JaxRuntimeError, match="other"):
        write(lm, ["ab"], 2)


def test_bytes_that_are_no_text_are_one_line(lm, tmp_path: Path):
    wrong = b"a\xff".decode(errors="surrogateescape")
    for tokenizer in (ByteTokenizer(), bpe(tmp_path), load_pretrained(LLAMA).tokenizer):
        named = dataclasses.replace(lm, tokenizer=tokenizer)
        with pytest.raises(ValueError, match="prompt 1 is no UTF-8 .byte 0xff after 1 characters"):
            write(named, ["b", wrong], 2)
        for text in (wrong, json.loads('"a\\ud800"')):
            with pytest.raises(ValueError, match="can't encode .*ud(800|cff)' ") as e:
                tokenizer.encode(text)
            assert "\n" not in str(e.value)
    for method in ("prompt", "rendered"):
        with pytest.raises(ValueError, match="can't encode"):
            getattr(load_pretrained(LLAMA).tokenizer, method)(wrong)
    with pytest.raises(ValueError, match="prompt 0 is no UTF-8"):
        answer(dataclasses.replace(lm, tokenizer=load_pretrained(LLAMA).tokenizer), [wrong], 2)
