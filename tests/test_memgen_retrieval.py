"""Retrieval: the right passage, cut to size, the same from single, batched and compiled calls."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memgen_tiny import NEW, NOBODY, VOCAB, in_numpy, memgen_of

from memgen import MemGen, Response, Snippets
from memgen.decoding import begin, make_request, pad_prompts, respond, row_keys
from memgen.insertion import PROMPT
from memgen.retrieval import BM25Retriever
from memgen.session import Session

PASSAGES = [
    "the heron waits in the shallow water of the river",
    "the kettle boils water for tea in the kitchen",
    "a glacier grinds the valley floor to a smooth bowl",
]


def encode(text: str) -> list[int]:
    return list(text.encode())


def decode(ids) -> str:
    return bytes(ids).decode(errors="replace")


def retriever(**settings) -> BM25Retriever:
    return BM25Retriever(PASSAGES, encode, decode, **settings)


def batch(*texts: str, width: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded queries; the padding spells a word of passage 2, so that reading it shows."""
    padding = encode(" glacier" * width)
    rows = [(encode(text) + padding)[:width] for text in texts]
    return np.array(rows, np.int32), np.array([len(text) for text in texts], np.int32)


@pytest.mark.parametrize(
    ("query", "expected"),
    [("where does the Heron wait?", 0), ("tea, from which KETTLE?", 1), ("GLACIER", 2)],
)
def test_the_right_passage_comes_first(query: str, expected: int):
    ids, length = batch(query)
    found, found_length = retriever(top=1, max_snippet_tokens=64).retrieve(
        ids, length, np.array([True])
    )
    assert decode(found[0, : found_length[0]].tolist()) == PASSAGES[expected]
    assert not found[0, found_length[0] :].any()


def test_snippets_stand_best_first_and_the_end_is_cut():
    size = len(PASSAGES[1]) + 9
    find = retriever(top=2, max_snippet_tokens=size)
    found, length = find.retrieve(*batch("water for tea"), np.array([True]))
    assert found.shape == (1, size) and length[0] == size
    assert decode(found[0].tolist()) == PASSAGES[1] + "the heron"


def test_equal_scores_go_to_the_first_passage():
    same = BM25Retriever(["one fish", "two fish", "red fish"], encode, decode, top=2)
    assert same.best("fish") == [0, 1]
    assert sorted(retriever(top=3).best("heron kettle")) == [0, 1]  # no word in common with 2


def test_nothing_in_common_and_not_asking_give_no_snippet():
    ids, length = batch("zebra", "", "glacier")
    found, found_length = retriever().retrieve(ids, length, np.array([True, True, False]))
    assert not found.any() and found_length.tolist() == [0, 0, 0]


def test_batch_equals_single():
    find, texts = retriever(top=2), ["heron in the water", "the smooth bowl of tea", "zebra"]
    ids, length = batch(*texts)
    found, found_length = find.retrieve(ids, length, np.ones(3, bool))
    assert found_length[2] == 0 < found_length[0]
    for row, text in enumerate(texts):
        single, single_length = find.retrieve(*batch(text, width=30), np.array([True]))
        assert (found[row] == single[0]).all() and found_length[row] == single_length[0]


def test_compiled_loop_equals_direct_call():
    """In a jitted loop, in a branch that only some steps take; a second batch compiles nothing."""
    find = retriever(top=2, max_snippet_tokens=16)

    @jax.jit
    def loop(ids, length):
        def step(index, answers):
            def ask(_):
                asks = jnp.arange(len(ids)) < index
                return jax.pure_callback(find.retrieve, empty, ids, length - index, asks)

            return jax.lax.cond(index % 2 == 1, ask, lambda _: answers, None)

        empty = (
            jnp.zeros((len(ids), find.max_snippet_tokens), jnp.int32),
            jnp.zeros(len(ids), jnp.int32),
        )
        return jax.lax.fori_loop(0, 4, step, empty)

    for texts in (("heron   ", "kettle   "), ("a bowl of tea   ", "zebra   ")):
        ids, length = batch(*texts)
        found = loop(ids, length)
        expected = find.retrieve(ids, length - 3, np.array([True, True]))
        assert expected[1][0] > 0
        for got, want in zip(found, expected, strict=True):
            assert got.dtype == jnp.int32
            np.testing.assert_array_equal(got, want)
    assert loop._cache_size() == 1


def in_one_pass(made: MemGen, prompts: list[list[int]]) -> np.ndarray:
    """Latents of the prompts' events, with the whole passage as snippet, without any cache."""
    tokens, length = pad_prompts(prompts, VOCAB)
    snippet = np.tile(np.array([99, 30, 41, 50], np.int32), (len(prompts), 1))

    @jax.jit
    def weave(made, tokens, snippet):
        vectors, told = (made.reasoner.embed_tokens(ids) for ids in (tokens, snippet))
        snippets = Snippets(told, jnp.full(len(prompts), 4))
        kind = jnp.full(len(prompts), PROMPT)
        return made.weaver.weave(made.weaving(), vectors, length, kind, snippets)

    return np.asarray(weave(made, tokens, snippet))


def test_52_snippets_reach_the_weaver_and_never_the_reasoner():
    """No snippets is no retrieval: the same tokens and events, log-probabilities to 1e-5 (the
    programs differ in shape). With snippets the latents change and the input sequence is as long.
    """
    made = memgen_of()
    words = lambda ids: " ".join(f"word{number}" for number in ids)  # noqa: E731
    ids = lambda text: [int(word[4:]) for word in text.split()]  # noqa: E731
    find = BM25Retriever(["word99 word30 word41 word50"], ids, words, max_snippet_tokens=8)
    # Prompts hold a word of the passage or none; nobody says it or the others. As long as those
    # that other tests share a program for.
    some = [[5, 6, 7], [1, 2], [98, 99, *[8, 3] * 16]]
    every = [[99, 6, 7], [1, 99], some[2]]

    def respond_to(prompts, retriever) -> tuple[Response, Session]:
        tokens, length = pad_prompts(prompts, VOCAB)
        request = make_request(made, NEW, valid_vocab_size=3, stop=NOBODY, retriever=retriever)
        keys, room = row_keys(0, prompts), tokens.shape[1] + 16
        session = begin(made, tokens, length, keys, room, request=request)
        answer, session = respond(made, session, request, 16)
        answer, read = in_numpy((answer, session.reasoner.length))
        # Prompts, latents (3 of the prompt's event, 2 of others) and new tokens: no snippets.
        latents = ((answer.points >= 0) * np.array([3, 2, 2])).sum(axis=1)
        np.testing.assert_array_equal(read, length + answer.count + latents)
        return answer, session

    without, session = respond_to(some, None)
    assert ((without.points >= 0).sum(axis=1) > 1).any()
    found, _ = respond_to(some, find)
    for name in ("tokens", "count", "decisions", "points"):
        np.testing.assert_array_equal(getattr(found, name)[:2], getattr(without, name)[:2])
    for name in ("log_probs", "latents"):
        mine, other = getattr(found, name)[:2], getattr(without, name)[:2]
        np.testing.assert_allclose(mine, other, atol=1e-5)
    assert (abs(found.latents[2, 0] - without.latents[2, 0]) > 1e-2).any()

    without, _ = respond_to(every, None)
    found, _ = respond_to(every, find)
    assert (abs(found.latents[:, 0] - without.latents[:, 0]).max(axis=(1, 2)) > 1e-2).all()
    np.testing.assert_allclose(found.latents[:, 0], in_one_pass(made, every), atol=1e-5)
    with pytest.raises(ValueError, match="gives up to 8 tokens, the session holds 0"):
        respond(made, session, make_request(made, NEW, retriever=find), 16)


def test_files_are_cut_into_passages(tmp_path: Path):
    text = tmp_path / "notes.txt"
    text.write_text("one two\n  three four five")
    lines = tmp_path / "facts.jsonl"
    facts = ["six\u2028seven", "eight"]
    lines.write_text("\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in facts) + "\n\n")
    found = BM25Retriever.from_files([text, str(lines)], encode, decode, passage_words=3)
    assert found.passages == ("one two\n  three", "four five", "six\u2028seven", "eight")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "fine"}\n{"title": "no text"}', r"line 2 .*\"text\".*title"),
        ('{"text": 7}', "line 1.*7, give a string"),
        ("not json", "line 1.*not json"),
        ("[1]", "line 1"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: str, message: str):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        BM25Retriever.from_files([path], encode, decode)
    assert "\n" not in str(error.value)


def test_a_mark_of_byte_order_is_no_text(tmp_path: Path):
    for name, content in (("a.jsonl", '{"text": "some words"}\r\n'), ("a.txt", "some words\r\n")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        found = BM25Retriever.from_files([tmp_path / name], encode, decode)
        assert found.passages == ("some words",)


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\xfa")
    for paths, message in (
        ([empty], "no passages in .*empty.txt"),
        ([], "no passages in no files"),
        ([tmp_path / "none.txt"], "cannot read .*none.txt"),
        ([binary], "cannot read .*binary.txt"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            BM25Retriever.from_files(paths, encode, decode)
        assert "\n" not in str(error.value)
    for path in (empty, str(empty)):
        with pytest.raises(ValueError, match=r"paths='.*empty.txt': give a list of paths"):
            BM25Retriever.from_files(path, encode, decode)  # pyright: ignore
    with pytest.raises(ValueError, match="passages are one str: give a list"):
        BM25Retriever("some words", encode, decode)
    with pytest.raises(ValueError, match="passage_words=0"):
        BM25Retriever.from_files([empty], encode, decode, passage_words=0)
    with pytest.raises(ValueError, match="top=0"):
        retriever(top=0)
    with pytest.raises(ValueError, match="max_snippet_tokens=0"):
        retriever(max_snippet_tokens=0)
    with pytest.raises(ValueError, match="2 passages without a word"):
        BM25Retriever(["?", "..."], encode, decode)
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ValueError, match=r"thoughtbubbles\[memgen\]"):
        retriever()
