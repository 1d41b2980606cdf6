"""Streams, bubble maps and responses as HTML: well formed, escaped, complete, without assets."""

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from memgen import Response
from memgen.figures import strips_figure
from thoughtbubbles import Streams
from thoughtbubbles.bubbles import BubbleMap

HOSTILE = (
    *("<script>alert(1)</script>", '"quo\'te"', "\n", "a\u202eb"),
    *("\u200d", "שלום", "👩\u200d🚀", "&lt;"),
)
TAGS = set(["html", "head", "meta", "title", "style", "body", "div", "p", "span", "i", "b", "bdi"])


class Element(NamedTuple):
    tag: str
    attributes: dict[str, str | None]
    text: list[str]


class Parsed(HTMLParser):
    """The elements of a document, each of which must be closed; `<meta>` has no end."""

    def __init__(self, document: str):
        super().__init__()
        self.elements: list[Element] = []
        self.open: list[Element] = []
        self.feed(document)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, dict(attrs), []))
        assert len(dict(attrs)) == len(attrs)
        if tag != "meta":
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.open[-1].text.append(data)

    def having(self, kind: str) -> list[Element]:
        return [e for e in self.elements if kind in (e.attributes.get("class") or "").split()]

    def titles(self, kind: str) -> list[str]:
        return [e.attributes["title"] or "" for e in self.having(kind) if "title" in e.attributes]

    def texts(self, kind: str) -> list[str]:
        return ["".join(element.text) for element in self.having(kind)]


def saved(page: Any, folder: Path) -> Parsed:
    """A page as a file, which must hold what Jupyter shows and need nothing from elsewhere."""
    page.save(folder / "page.html")
    document = (folder / "page.html").read_text(encoding="utf-8")
    assert page.body in document and page.body in page._repr_html_()
    assert not re.search(r"https?:|src=|href=|@import|url\(|<script|\bon\w+=\"", document)
    parsed = Parsed(document)
    assert {element.tag for element in parsed.elements} <= TAGS
    return parsed


def map_of(tokens: tuple[str, ...], count: int = 2, score: float = 0.25) -> BubbleMap:
    streams = np.full((3, len(tokens)), count, np.int32)
    return BubbleMap(streams, np.full(streams.shape, score, np.float32), tokens, (1, 2))


def test_a_bubble_map_shows_all_tokens_with_streams_and_scores(tmp_path: Path):
    found = map_of(HOSTILE)
    found.streams[2] = [0, 3, 1, 1, 1, 1, 1, 12]
    found.score[2, 1] = 0.875
    page = saved(found.page(), tmp_path)
    shown = [text for text in page.texts("text") if text]
    assert shown == ["<script>alert(1)</script>"[:23] + "…", "\"quo'te\"", "⏎", "a·b", "\u200d",
                     "שלום", "👩\u200d🚀", "&lt;"]  # fmt: skip
    titles = page.titles("token")
    assert titles[0].startswith("token 0: '<script>alert(1)</script>'\nfork 1: 2 streams, mean")
    assert titles[1].endswith("fork 1: 2 streams, mean score 0.250\n"
                              "fork 2: 3 streams, mean score 0.875")  # fmt: skip
    [line] = page.having("line")
    assert line.attributes["dir"] == "ltr"
    dots = [element for element in page.elements if element.tag == "i"]
    assert len(dots) == 2 * 8 + (0 + 3 + 5)  # twelve streams are a number
    assert [e.attributes["style"] for e in dots].count("--p:0.875") == 3
    assert ["".join(e.text) for e in page.elements if e.tag == "b"] == ["12"]


def test_text_from_right_to_left_runs_from_right_to_left():
    directions = {
        text: Parsed(map_of(tuple(text)).page().body).having("line")[0].attributes["dir"]
        for text in ("1. שלום", "سلام", "a שלום", "12")
    }
    assert list(directions.values()) == ["rtl", "rtl", "ltr", "ltr"]


def test_a_long_text_is_cut_and_says_so(tmp_path: Path):
    page = saved(map_of(("ab",) * 1234).page(), tmp_path)
    lines = len(page.having("line"))
    assert len(page.having("token")) == 1000 + lines and lines > 10  # and the names of each line
    notes = ["".join(element.text) for element in page.elements if element.tag == "p"]
    assert notes[-1] == "234 more tokens are left out here"


def streams_of(rows: int = 2, tokens: int = 3) -> Streams:
    """In each row token 0 has a fork, token 1 none, and the last token is padding."""
    token = np.tile([0, 0, 1, 1], (rows, 1)).astype(np.int32)
    alive = np.tile([True, True, True, False], (rows, 1))
    log_score = np.log(np.tile(np.float32([0.25, 1.0, 0.5, 1.0]), (rows, 1)))
    first = np.arange(rows, dtype=np.int32) * 10
    x, length = np.zeros((rows, 4, 5), np.float32), np.full(rows, tokens - 1, np.int32)
    return Streams(x, log_score, token, alive, length, first, tokens, forked=True)  # type: ignore


def test_streams_are_dots_with_slot_score_and_position(tmp_path: Path):
    texts = [["<b>", "x", ""], ["\n", "y", "z"]]
    page = saved(streams_of().page(texts), tmp_path)
    dots = [e.attributes.get("title") for e in page.elements if e.tag == "i"]
    assert dots[:3] == [
        "slot 0: score 0.250, position -0.5",
        "slot 1: score 1.000, position 0, original",
        "slot 2: score 0.500, position 1, original",
    ]
    assert len(dots) == 6 and len(page.having("original")) == 4
    assert page.titles("token")[0].splitlines() == ["token 0: '<b>', 2 streams", *dots[:2]]
    assert page.titles("token")[2].startswith("token 2: '', 0 streams")
    assert page.titles("token")[3].startswith("token 10: '\\n', 2 streams")
    positions = np.asarray(streams_of().positions())
    assert [f"{p:.4g}" for p in positions[0, :3]] == ["-0.5", "0", "1"]


def test_what_streams_cannot_show_is_their_repr_or_one_line():
    streams, whole = streams_of(), streams_of(12)
    assert "4 more rows are left out here" in whole._repr_html_()
    with pytest.raises(ValueError, match=r"texts of \[1\] tokens for 2 rows of 3: give one text"):
        streams.page([["a"]])
    abstract = jax.eval_shape(lambda streams: streams, streams)
    assert abstract._repr_html_() is None and "float32[2,4,5]" in repr(abstract)
    with pytest.raises(ValueError, match="has no values here: show it outside of jit"):
        abstract.page()

    def traced(streams: Streams) -> Streams:
        assert streams._repr_html_() is None
        return streams

    jax.eval_shape(traced, streams)


def response_of(rows: int = 2) -> Response:
    """Four tokens a row; memory before the first (two latents) and the third (one)."""
    latents = np.zeros((rows, 3, 2, 5), np.float32)
    latents[:, 0, :, 0], latents[:, 1, 0, 0] = [3.0, 4.0], 0.5
    return Response(
        tokens=np.tile(np.int32([0, 1, 2, 3]), (rows, 1)),
        count=np.full(rows, 4, np.int32),
        log_probs=np.full((rows, 4), -0.25, np.float32),
        decisions=np.tile(np.int8([1, -1, 1, 0]), (rows, 1)),
        latents=latents,
        points=np.tile(np.int32([0, 2, -1]), (rows, 1)),
    )  # type: ignore


def test_a_response_shows_its_memories_where_they_were_woven(tmp_path: Path):
    response = response_of()
    page = saved(response.page(HOSTILE.__getitem__, [[3], [5, 6]]), tmp_path)
    assert page.titles("memory") == 2 * [
        "event 0, before new token 0: 2 latents of norm 3, 4",
        "event 1, before new token 2: 1 latents of norm 0.5",
    ]
    assert sum(element.tag == "i" for element in page.elements) == 6
    expected = ["prompt token 0: id 5, 'שלום'", f"prompt token 1: id 6, {HOSTILE[6]!r}"]
    assert page.titles("prompt")[1:] == expected
    assert page.titles("skipped")[0].startswith("new token 3, log-probability -0.250, memory skip")
    kinds = [e.attributes["class"].split()[0] for e in page.elements if "title" in e.attributes]
    assert kinds[:6] == ["token", "memory", "token", "token", "memory", "token"]
    assert [row.attributes["dir"] for row in page.having("row")] == ["ltr", "rtl"]
    assert Parsed(response._repr_html_()).titles("skipped")[0].endswith("id 3, '3'")


def test_large_responses_are_cut_and_short_ones_refuse_other_prompts():
    many = response_of(20)
    assert "4 more rows are left out here" in many._repr_html_()
    long = dataclasses.replace(many, tokens=np.zeros((20, 1200), np.int32),
                               count=np.full(20, 1200), log_probs=np.zeros((20, 1200)),
                               decisions=np.full((20, 1200), -1))  # fmt: skip
    assert "202 more cells of the row are left out here" in long._repr_html_()
    with pytest.raises(ValueError, match="1 prompts for 20 rows: give the prompt of each row"):
        many.page(prompts=[[1]])
    abstract = jax.eval_shape(lambda response: response, many)
    assert abstract._repr_html_() is None
    assert repr(abstract) == repr(many) and len(repr(many)) < 200


def test_values_of_one_row_or_not_here_are_not_shown():
    streams, response = streams_of(), response_of()
    for values in (streams, response):
        row = jax.tree.map(lambda a: a[0], values)
        assert row._repr_html_() is None
        with pytest.raises(ValueError, match=r"tokens \(\d+,\): give \[B, .*such as a\[None\]"):
            row.page()
        gone = jax.tree.map(jax.numpy.array, values)
        assert gone._repr_html_() is not None
        jax.tree.map(lambda array: array.delete(), gone)
        assert gone._repr_html_() is None
        with pytest.raises(ValueError, match="has no values here: show it outside of jit, on one"):
            gone.page()


def test_streams_of_later_tokens_are_named_by_their_indices():
    later = Streams.start(jax.numpy.zeros((1, 2, 4)), first=[10])
    shown = Parsed(later._repr_html_())
    assert "".join(shown.having("text")[1].text) == "10"
    assert shown.titles("token")[0].startswith("token 10: '10'")


def test_latents_of_nan_are_shown():
    response = response_of()
    response.latents[:, 0] = np.nan
    assert "2 latents of norm nan, nan" in response.page().body


def test_strips_take_the_rows_there_are_and_texts_as_they_stand():
    responses = {"$\\alph$": response_of()}
    figure = strips_figure(responses, [[1], [2]], lambda id_: "$\\alph$")
    figure.draw_without_rendering()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == 2 * ["$\\alph$"]
    with pytest.raises(ValueError, match="row 2 of 2 rows: choose from 0 to 1"):
        strips_figure(responses, [[1], [2]], str, rows=[2])


def test_strips_draw_prompt_memories_and_skipped_chances():
    responses = {"a": response_of(), "b": response_of()}
    figure = strips_figure(responses, [[1], [2]], "abcd".__getitem__, [1])
    [axis] = figure.axes
    assert [text.get_text() for text in axis.texts] == 2 * ["c", "a", "b", "c", "d"]
    colours = [bar.get_facecolor()[:3] for bar in axis.patches]
    assert sum(colour == (0xD5 / 255, 0x5E / 255, 0) for colour in colours) == 2 * 3
    assert len(axis.collections) == 2
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]
