"""HTML pages that draw streams, bubble maps and lenses, for Jupyter or as a single file."""

from __future__ import annotations

import dataclasses
import html
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

TOKENS, ROWS, DOTS = 1000, 8, 8  # maximum tokens of a page, rows of a page, dots of a token
LINE = 90  # characters
LONGEST = 24  # characters shown of a token's text; the tooltip has the whole text
_JOINERS = "\u200c\u200d"  # not printable, but emoji and Persian are other texts without them

STYLE = """
.bubble-page { font: 14px/1.4 ui-monospace, Menlo, Consolas, monospace; color: #1a1a1a;
  background: #fff; padding: 8px; overflow-x: auto; }
.bubble-page p { margin: 4px 0; color: #555; }
.bubble-page .line { display: flex; align-items: flex-end; margin: 0 0 10px; }
.bubble-page .token { display: flex; flex-direction: column; align-items: center;
  padding: 0 2px; border-radius: 3px; }
.bubble-page .token:hover { background: #fdf1d5; }
.bubble-page .streams { display: flex; direction: ltr; align-items: center; height: 13px; }
.bubble-page .streams i { width: 7px; height: 7px; border-radius: 50%; margin: 0 1px;
  border: 1px solid #0072b2; background: rgb(0 114 178 / var(--p, 1)); }
.bubble-page .streams i.original { border-color: #1a1a1a; background: rgb(26 26 26 / var(--p)); }
.bubble-page .streams u { font-size: 10px; text-decoration: none; white-space: pre;
  padding: 0 2px; border-radius: 2px; background: rgb(0 114 178 / calc(var(--p) * 0.5)); }
.bubble-page .streams b { font-size: 10px; color: #0072b2; }
.bubble-page .text { white-space: pre; min-width: 9px; text-align: center; height: 20px;
  border-bottom: 1px solid #ccc; }
.bubble-page .names { align-items: flex-start; color: #777; font-size: 11px; flex: none;
  padding-inline-end: 10px; }
.bubble-page .names .text { border-color: transparent; }
"""


@dataclasses.dataclass(frozen=True)
class Page:
    """A drawing in HTML, which Jupyter displays as the last value of a cell.

    Attributes:
        title: Title of the page, in plain text.
        body: HTML of the page's content, in which all texts are escaped.
    """

    title: str
    body: str = dataclasses.field(repr=False)

    def save(self, path: str | Path) -> None:
        """Write the page as an HTML file that needs no other file.

        Args:
            path: Path of the file; an existing file is overwritten.
        """
        head = f'<meta charset="utf-8"><title>{html.escape(self.title)}</title>'
        text = f"<!DOCTYPE html>\n<html><head>{head}<style>{STYLE}</style></head>\n"
        Path(path).write_text(f"{text}<body>{self.body}</body></html>\n", encoding="utf-8")

    def _repr_html_(self) -> str:
        return f"<style>{STYLE}</style>{self.body}"


class Guess(NamedTuple):
    """A lens's top-ranked token at one position and one site, as `lens_page` draws it.

    Attributes:
        text: Text of the token that the lens ranks first.
        strength: Strength of the colour behind the text, from 0 to 1.
        said: Lines of the tooltip.
    """

    text: str
    strength: float
    said: Sequence[str]


class Cell(NamedTuple):
    """A token on a page, with levels of dots or words above it.

    Attributes:
        text: Text of the token.
        title: Text of the tooltip.
        levels: HTML of each level above the token, from top to bottom.
        dots: Dots (or columns of text) of the widest level; the cell's width is estimated from it.
    """

    text: str
    title: str
    levels: Sequence[str]
    dots: int


def map_page(
    streams: np.ndarray, score: np.ndarray, tokens: Sequence[str], fork_layers: Sequence[int]
) -> Page:
    """Draw a bubble map: above each token, the number of its streams after each fork layer.

    Args:
        streams: `[num_layers, T]`, number of live streams of each token in each block.
        score: `[num_layers, T]`, mean cumulative score p of each token's streams in each block.
        tokens: Text of each token.
        fork_layers: Indices of the blocks that directly follow a fork layer.
    """
    cells, layers = [], list(reversed(fork_layers))
    for at, token in enumerate(tokens[:TOKENS]):
        title = [f"token {at}: {token!r}"]
        for layer in fork_layers:
            count, mean = streams[layer, at], _p(score[layer, at])
            title.append(f"fork {layer}: {count} streams, mean score {mean}")
        levels = [_equal_dots(int(streams[layer, at]), score[layer, at]) for layer in layers]
        most = max((int(streams[layer, at]) for layer in layers), default=0)
        cells.append(Cell(token, "\n".join(title), levels, most))
    names = [f"fork {layer}" for layer in layers]
    said = "each dot a stream, the fuller the higher the mean score of its bubble"
    parts = [_note(f"{len(tokens)} tokens; {said}"), *_lines(cells, names)]
    return Page("Bubble map", _wrap(parts + _left_out(len(tokens), TOKENS, "tokens")))


def streams_page(
    log_score: np.ndarray,
    token: np.ndarray,
    alive: np.ndarray,
    first: np.ndarray,
    num_tokens: int,
    texts: Sequence[Sequence[str]] | None = None,
) -> Page:
    """Draw the streams of a batch: above each token, one dot for each stream of the token.

    Args:
        log_score: `[B, S]`, cumulative log-score of each stream.
        token: `[B, S]`, index of each stream's token within the row.
        alive: `[B, S]` bool, True for slots that hold a stream.
        first: `[B]`, number of tokens of the sequence before the row's first token.
        num_tokens: Number `T` of tokens of a row, padding included.
        texts: Text of each token of each row; by default the tokens' indices are shown.

    Raises:
        ValueError: `texts` does not hold `T` texts for each row.
    """
    if texts is not None and [len(row) for row in texts] != [num_tokens] * len(token):
        raise ValueError(
            f"texts of {[len(row) for row in texts]} tokens for {len(token)} rows of {num_tokens}: "
            "give one text for each token, padding included"
        )
    live = alive.sum(axis=1).tolist()
    rows = f"{len(token)} row{'s'[: len(token) != 1]}"
    parts = [_note(f"{rows} of {num_tokens} tokens; dark dots are originals, blue ones forks; the "
                   "fuller, the higher the score")]  # fmt: skip
    for row in range(min(len(token), ROWS)):
        parts.append(_note(f"row {row}: {live[row]} live streams in {alive.shape[1]} slots"))
        scores = np.exp(log_score[row]).tolist()
        shown = [
            _bubble(
                np.flatnonzero(alive[row] & (token[row] == at)), scores, at,
                int(first[row]), str(int(first[row]) + at) if texts is None else texts[row][at],
            )
            for at in range(min(num_tokens, TOKENS // ROWS))
        ]  # fmt: skip
        parts += _lines(shown, [""])
        parts += _left_out(num_tokens, TOKENS // ROWS, "tokens of the row")
    return Page("Streams", _wrap(parts + _left_out(len(token), ROWS, "rows")))


def lens_page(
    title: str,
    note: str,
    tokens: Sequence[str],
    sites: Sequence[str],
    guesses: Sequence[Sequence[Guess]],
) -> Page:
    """Draw a lens: above each token, the top-ranked token at each site, with the last site on top.

    Args:
        title: Title of the page.
        note: Description of the lens, in one line.
        tokens: Text of each token.
        sites: Names of the sites, in the order of the forward pass.
        guesses: For each site in the order of `sites`, one guess for each token.
    """
    cells = []
    for at, token in enumerate(tokens[:TOKENS]):
        column = [row[at] for row in reversed(guesses)]
        levels, widest = [], 1
        for site, guess in zip(reversed(sites), column, strict=True):
            text = _visible(guess.text)[:DOTS]
            widest = max(widest, _columns(text))
            said = "\n".join([f"token {at}: {token!r}", site, *guess.said])
            full = min(max(float(np.nan_to_num(guess.strength)), 0.0), 1.0)
            levels.append(
                f'<u title="{_quoted(said)}" style="--p:{full:.3f}">{html.escape(text)}</u>'
            )
        cells.append(Cell(token, f"token {at}: {token!r}", levels, widest))
    parts = [_note(f"{len(tokens)} tokens; {note}"), *_lines(cells, list(reversed(sites)))]
    return Page(title, _wrap(parts + _left_out(len(tokens), TOKENS, "tokens")))


def _bubble(slots: np.ndarray, score: Sequence[float], at: int, first: int, text: str) -> Cell:
    dots, said = [], [f"token {first + at}: {text!r}, {len(slots)} streams"]
    for rank, slot in enumerate(slots):
        left = len(slots) - 1 - rank
        position = first + at - left / len(slots)
        said.append(
            f"slot {slot}: score {_p(score[slot])}, position {position:.4g}"
            + ("" if left else ", original")
        )
        dots.append(_dot(score[slot], "" if left else "original", said[-1]))
    if len(dots) > DOTS:
        dots = [f"<b>{len(dots) - DOTS + 1}+</b>", *dots[-DOTS + 1 :]]
    return Cell(text, "\n".join(said[: 4 * DOTS]), ["".join(dots)], len(dots))


def _equal_dots(count: int, score: float) -> str:
    if count > DOTS:
        return f"<b>{count}</b>"
    return _dot(score) * count


def _dot(score: float, kind: str = "", title: str = "") -> str:
    full = min(max(float(np.nan_to_num(score)), 0.0), 1.0)
    named = f' class="{kind}"' * bool(kind) + f' title="{_quoted(title)}"' * bool(title)
    return f'<i{named} style="--p:{full:.3f}"></i>'


def _lines(cells: Sequence[Cell], names: Sequence[str]) -> Iterable[str]:
    """Yield the HTML of cells in lines of about `LINE` characters, each led by the level names."""
    levels = "".join(f'<span class="streams">{html.escape(name)}</span>' for name in names)
    label = f'<span class="token names">{levels}<span class="text"></span></span>'
    direction = _direction("".join(cell.text for cell in cells))
    line, used = [], 0.0
    for cell in cells:
        text = _visible(cell.text)
        width = max(_columns(text), min(cell.dots, DOTS) * 1.2) + 0.5
        if line and used + width > LINE:
            yield f'<div class="line" dir="{direction}">{label}{"".join(line)}</div>'
            line, used = [], 0.0
        inner = "".join(f'<span class="streams">{level}</span>' for level in cell.levels)
        inner += f'<bdi class="text">{html.escape(text)}</bdi>'
        line.append(f'<span class="token" title="{_quoted(cell.title)}">{inner}</span>')
        used += width
    if line:
        yield f'<div class="line" dir="{direction}">{label}{"".join(line)}</div>'


def _left_out(count: int, most: int, noun: str) -> list[str]:
    return [_note(f"{count - most:,} more {noun} are left out here")] if count > most else []


def _note(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _wrap(parts: Iterable[str]) -> str:
    return f'<div class="bubble-page">{"".join(parts)}</div>'


def _quoted(text: str) -> str:
    return html.escape(text).replace("\n", "&#10;")


def _p(score: float) -> str:
    return f"{float(score):.3f}"


def _visible(token: str) -> str:
    marks = {"\n": "⏎", "\t": "⇥", "\r": "␍"}
    chars = (marks.get(c, c if c.isprintable() or c in _JOINERS else "·") for c in token)
    text = "".join(chars) or "·"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def _direction(text: str) -> str:
    """Direction ("ltr" or "rtl") of a text's first letter that has one (Unicode's rule P2)."""
    kinds = (unicodedata.bidirectional(char) for char in text)
    return "rtl" if next((k for k in kinds if k in ("L", "R", "AL")), "L") != "L" else "ltr"
