"""Responses rendered as HTML, for display in Jupyter or as a self-contained file."""

from __future__ import annotations

import dataclasses
import html
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

TOKENS, ROWS = 1000, 16  # maximum numbers of cells of a row and of rows of a page
LONGEST = 24  # maximum characters shown of a token's text; the title holds the entire text
_JOINERS = "\u200c\u200d"  # not printable, but essential to emoji and Persian text
_DECISIONS = ("no decision", "memory skipped", "memory woven")  # for -1, 0, 1

STYLE = """
.memory-page { font: 14px/1.4 ui-monospace, Menlo, Consolas, monospace; color: #1a1a1a;
  background: #fff; padding: 8px; }
.memory-page p { margin: 4px 0; color: #555; }
.memory-page .row { display: flex; flex-wrap: wrap; row-gap: 6px; margin: 0 0 10px; }
.memory-page .token { white-space: pre; min-width: 9px; text-align: center; padding: 1px 2px;
  border: 1px solid #ccc; border-inline-start-width: 0; }
.memory-page .prompt { background: #eee; }
.memory-page .skipped { border-inline-start: 2px dotted #0072b2; }
.memory-page .memory { display: flex; gap: 2px; padding: 0 3px; background: #fbe9de;
  border: 1px solid #d55e00; }
.memory-page .memory i { width: 3px; background: #d55e00; margin: 2px 0; }
.memory-page .token:hover, .memory-page .memory:hover { outline: 2px solid #e69f00; }
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


def response_page(
    rows: Sequence[Sequence[int]],
    log_probs: np.ndarray,
    decisions: np.ndarray,
    latents: np.ndarray,
    points: np.ndarray,
    text_of: Callable[[int], str] = str,
    prompts: Sequence[Sequence[int]] | None = None,
) -> Page:
    """Render a response as HTML: each row's tokens, and a bar for each latent between tokens.

    Args:
        rows: New token ids of each row.
        log_probs: `[B, T]` log-probability of each new token.
        decisions: `[B, T]` decision before each new token: -1 none, 0 skipped, 1 invoked.
        latents: `[B, E, K, D]` latents of `E` events with `K` latent slots each.
        points: `[B, E]` index of the new token after each event; -1 for an unused event.
        text_of: Function from a token id to its text.
        prompts: Token ids of each row's prompt, shown before the row's new tokens; by default no
            prompts are shown.

    Raises:
        ValueError: The number of prompts is not the number of rows.
    """
    if prompts is not None and len(prompts) != len(rows):
        raise ValueError(
            f"{len(prompts)} prompts for {len(rows)} rows: give the prompt of each row"
        )
    said = "bars are latents, dots in front of a token memory not taken"
    parts = [_note(f"{len(rows)} row{'s'[: len(rows) != 1]}; {said}")]
    norms = np.linalg.norm(latents[:ROWS].astype(np.float32), axis=-1)
    for row, ids in enumerate(rows[:ROWS]):
        prompt = [] if prompts is None else prompts[row]
        cells = [
            _token(id_, text_of, "prompt", f"prompt token {at}") for at, id_ in enumerate(prompt)
        ]
        for at in range(len(ids) + 1):
            for event in np.flatnonzero(points[row] == at):
                cells.append(_memory(int(event), at, norms[row, event]))
            if at < len(ids):
                decision = int(decisions[row, at])
                said = f"new token {at}, log-probability {log_probs[row, at]:.3f}, "
                kind = "skipped" if decision == 0 else ""
                cells.append(_token(ids[at], text_of, kind, said + _DECISIONS[decision + 1]))
        memories = (points[row] >= 0).sum()
        parts.append(_note(f"row {row}: {len(ids)} new tokens, {memories} memories"))
        direction = _direction("".join(map(text_of, [*prompt, *ids])))
        parts.append(f'<div class="row" dir="{direction}">{"".join(cells[:TOKENS])}</div>')
        parts += _left_out(len(cells), TOKENS, "cells of the row")
    parts += _left_out(len(rows), ROWS, "rows")
    return Page("Response", f'<div class="memory-page">{"".join(parts)}</div>')


def _token(id_: int, text_of: Callable[[int], str], kind: str, said: str) -> str:
    text = text_of(id_)
    title = _quoted(f"{said}: id {id_}, {text!r}")
    return f'<bdi class="token {kind}" title="{title}">{html.escape(_visible(text))}</bdi>'


def _memory(event: int, at: int, norms: np.ndarray) -> str:
    real = norms[norms != 0]  # a latent of zeros is an unused slot, unlike a latent of NaN
    sizes = ", ".join(f"{norm:.3g}" for norm in real)
    title = f"event {event}, before new token {at}: {len(real)} latents of norm {sizes}"
    return f'<span class="memory" title="{_quoted(title)}">{"<i></i>" * len(real)}</span>'


def _left_out(count: int, most: int, noun: str) -> list[str]:
    return [_note(f"{count - most:,} more {noun} are left out here")] if count > most else []


def _note(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _quoted(text: str) -> str:
    return html.escape(text).replace("\n", "&#10;")


def _visible(token: str) -> str:
    marks = {"\n": "⏎", "\t": "⇥", "\r": "␍", " ": "␣"}
    chars = (marks.get(c, c if c.isprintable() or c in _JOINERS else "·") for c in token)
    text = "".join(chars) or "·"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _direction(text: str) -> str:
    """Direction ("ltr" or "rtl") of a text's first letter that has one (Unicode's rule P2)."""
    kinds = (unicodedata.bidirectional(char) for char in text)
    return "rtl" if next((k for k in kinds if k in ("L", "R", "AL")), "L") != "L" else "ltr"
