"""Write solutions as responses, with answer, reasoning or both, and extract answers from them."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Literal, get_args

Form = Literal["answer", "thoughts", "both"]
_FENCE = re.compile(r"```\w*\s*")


@dataclasses.dataclass(frozen=True)
class Trace:
    """Solution of an example: reasoning and answer.

    Attributes:
        thoughts: Reasoning, whose last word is the answer.
        answer: Answer alone.
    """

    thoughts: str
    answer: str


def verbalise(trace: Trace, form: Form) -> str:
    """Write a solution as the text of a response.

    Args:
        trace: Solution of the example.
        form: Parts of the response: "answer" is the answer after an empty thinking block;
            "thoughts" is the reasoning alone, whose last word is the answer; "both" is reasoning
            and answer.

    Raises:
        ValueError: The form is unknown.
    """
    if form not in get_args(Form):
        raise ValueError(f"form={form!r}: choose from {', '.join(get_args(Form))}")
    if form == "thoughts":
        return f"<think>{trace.thoughts}</think>"
    thoughts = trace.thoughts if form == "both" else ""
    return f"<think>{thoughts}</think><answer>{trace.answer}</answer>"


def answer_in(response: str) -> str:
    """Extract the answer from a response in any form, without white space around it.

    The answer is the content of the last `<answer>` tags. Without tags, the answer is the first
    line after the thinking block, or the block's last word if nothing follows the block. If a JSON
    object begins in the tags or after the block, possibly in a Markdown code fence, the answer is
    the whole object, of any number of lines.

    Args:
        response: Text of a response; any text is allowed.

    Returns:
        Text of the answer; "" if there is none.
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
    """Return the text of the JSON object that a text begins with; "" if there is none."""
    fence = _FENCE.match(text)
    text = text[fence.end() :] if fence else text
    if not text.startswith("{"):
        return ""
    try:
        return text[: json.JSONDecoder().raw_decode(text)[1]]
    except (ValueError, RecursionError):
        return ""
