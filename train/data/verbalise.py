"""Responses from traces: the answer alone, the thoughts that lead to it, or both; and back."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Literal, get_args

Form = Literal["answer", "thoughts", "both"]
_FENCE = re.compile(r"```\w*\s*")


@dataclasses.dataclass(frozen=True)
class Trace:
    """How an example is solved.

    Attributes:
        thoughts: Reasoning, whose last word is the answer.
        answer: Answer alone.
    """

    thoughts: str
    answer: str


def verbalise(trace: Trace, form: Form) -> str:
    """Text of a response.

    Args:
        trace: How the example is solved.
        form: Parts of the response: the "answer" behind an empty thought; the "thoughts" alone,
            whose last word is the answer; or "both".

    Raises:
        ValueError: There is no such form.
    """
    if form not in get_args(Form):
        raise ValueError(f"form={form!r}: choose from {', '.join(get_args(Form))}")
    if form == "thoughts":
        return f"<think>{trace.thoughts}</think>"
    thoughts = trace.thoughts if form == "both" else ""
    return f"<think>{thoughts}</think><answer>{trace.answer}</answer>"


def answer_in(response: str) -> str:
    """The answer of a response in any form, without space around it.

    That is what stands in the last `<answer>` tags; or else the first line behind the thoughts; or
    else, where nothing stands behind them, their last word. Where a JSON object begins in the tags
    or behind the thoughts, in a fence of Markdown or not, the answer is that object, of any number
    of lines.

    Args:
        response: Text of a response, whatever it is.
    """
    before, closed, _ = response.rpartition("</answer>")
    _, opened, inside = before.rpartition("<answer>")
    if closed and opened:
        return _json_object(inside.strip()) or inside.strip()
    thoughts, closed, behind = response.rpartition("</think>")
    if closed and not behind.strip():
        words = thoughts.removeprefix("<think>").rstrip().rsplit(maxsplit=1)
        return words[-1] if words else ""
    return _json_object(behind.strip()) or behind.strip().partition("\n")[0].strip()


def _json_object(text: str) -> str:
    """The JSON object that a text begins with, as it is written; "" where there is none."""
    fence = _FENCE.match(text)
    text = text[fence.end() :] if fence else text
    if not text.startswith("{"):
        return ""
    try:
        return text[: json.JSONDecoder().raw_decode(text)[1]]
    except (ValueError, RecursionError):
        return ""
