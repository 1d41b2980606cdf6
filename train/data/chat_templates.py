"""Render messages with a model's chat template, in a sandbox, and tokenise them with loss masks."""

import dataclasses
import datetime
import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from train.data.growing_ids import GrowingIds
from train.data.spelled import with_signs, without_special_tokens

if TYPE_CHECKING:
    from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
    from train.data.tokenizers import Tokenizer

Message = Mapping[str, Any]
INSTALL = 'pip install "jinja2>=3.1.6", or the extra "pretrained"'

TRAINING_DAY = datetime.datetime(2026, 1, 1)
"""Date that templates print in training: a fixed date, so that a resumed run has the same rows."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A tokenised text to train on, with its loss mask.

    Attributes:
        ids: Token ids of the text.
        loss_mask: Whether each token is in the loss, which covers the content and the end token of
            each learned answer.
    """

    ids: list[int]
    loss_mask: list[bool]


def chat_ids(tokenizer: "PretrainedTokenizer", messages: Sequence[Message]) -> list[int]:
    """Tokenise a conversation with the generation prompt that opens the model's answer.

    Args:
        tokenizer: Tokenizer with a chat template.
        messages: Messages of the conversation. Special tokens that they spell out are plain text,
            except for the assistant's.

    Raises:
        ValueError: The tokenizer has no chat template, or the template fails (see `render`).
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{tokenizer.name} has no chat template: leave out --chat to continue text"
        )
    return _rendered_ids(tokenizer, messages, add_generation_prompt=True)


def closed_ids(tokenizer: "PretrainedTokenizer", messages: Sequence[Message]) -> list[int]:
    """Tokenise a conversation without the generation prompt that opens the model's answer.

    Args:
        tokenizer: Tokenizer with a chat template.
        messages: Messages of the conversation.

    Raises:
        ValueError: The template fails (see `render`).
    """
    return _rendered_ids(tokenizer, messages, add_generation_prompt=False)


def _rendered_ids(
    tokenizer: "PretrainedTokenizer", messages: Sequence[Message], add_generation_prompt: bool
) -> list[int]:
    messages, spelled = without_special_tokens(tokenizer, messages)
    text = render(
        str(tokenizer.chat_template),
        messages,
        bos_token=tokenizer.bos,
        eos_token=tokenizer.eos,
        source=f"the chat template of {tokenizer.name}",
        add_generation_prompt=add_generation_prompt,
    )
    return tokenizer.rendered(text, spelled)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the leading token ids that two sequences have in common."""
    return len(os.path.commonprefix([list(one), list(other)]))


def open_turn(
    tokenizer: "PretrainedTokenizer",
    messages: Sequence[Message],
    prefill: str = "",
    role: str = "assistant",
) -> list[int]:
    """Tokenise a conversation whose last turn has begun but not ended, for a model to continue.

    An assistant's turn begins with the generation prompt. A user's turn is rendered with the
    prefill as its content, and whatever the template adds after the prefill is removed.

    Args:
        tokenizer: Tokenizer with a chat template.
        messages: Messages before the open turn.
        prefill: Text with which the open turn begins. White space at the end of the prefill is
            removed, because templates may trim it.
        role: Role that speaks in the open turn: "assistant" or "user".

    Returns:
        Token ids of the text up to the end of the prefill.

    Raises:
        ValueError: The tokenizer has no chat template, the template fails or does not show the
            prefill unchanged, the role is unknown, or a user's turn has no prefill.
    """
    if role not in ("assistant", "user"):
        raise ValueError(f"role={role!r}: choose from assistant, user")
    prefill = prefill.rstrip()
    before = chat_ids(tokenizer, messages)
    if role == "assistant" and not prefill:
        return before
    fill = functools.partial(
        render,
        str(tokenizer.chat_template),
        bos_token=tokenizer.bos,
        eos_token=tokenizer.eos,
        source=f"the chat template of {tokenizer.name}",
    )
    if role == "assistant":
        messages, spelled = without_special_tokens(tokenizer, messages)
        whole = tokenizer.rendered(fill(messages) + prefill, spelled)
        # As in training, where no token spans the header and the answer.
        follows = whole[: len(before)] == before
        return whole if follows else before + tokenizer.rendered(prefill)
    if not prefill:
        raise ValueError("a user's turn without a text: give a prefill that the user begins with")
    asked: list[Message] = [*messages, {"role": role, "content": prefill}]
    asked, spelled = without_special_tokens(tokenizer, asked)
    shown = asked[-1]["content"]
    # Two turns that differ right after the prefill: their common text ends with the prefill.
    one, other = (
        fill([*asked[:-1], {"role": role, "content": shown + end}], add_generation_prompt=False)
        for end in "01"
    )
    text = os.path.commonprefix([one, other])
    if not text.endswith(shown):
        raise ValueError(
            f"the chat template of {tokenizer.name} does not show {prefill[:40]!r} as it is: give "
            "another prefill"
        )
    return tokenizer.rendered(text, spelled)


def chat_examples(
    tokenizer: "PretrainedTokenizer",
    messages: Sequence[Message],
    in_loss: Sequence[bool] | None = None,
    tools: Sequence[Any] = (),
    close_thoughts: bool = False,
) -> list[Example]:
    """Tokenise a conversation as generation sees it, with a loss mask on its answers.

    The ids before each answer are exactly those of `chat_ids`. The ids of the answer follow, up to
    and including its first end token. An answer is encoded on its own where one token would span
    the boundary between prompt and answer. Special tokens that messages or tools spell out are
    plain text, except for the assistant's.

    Usually one example holds the whole conversation. A template may render an earlier answer
    differently once a later turn follows (without its thinking block, for instance), or the text
    may be tokenised differently. Generation then sees another prefix, so a new example begins.

    Args:
        tokenizer: Tokenizer with a chat template.
        messages: Messages, at least one of which has the role "assistant".
        in_loss: Whether each message is an answer to be learned; None learns all answers. All
            other messages are context.
        tools: Tools that the template shows, as JSON schemas.
        close_thoughts: Whether to begin an answer with an empty thinking block if the generation
            prompt opens a block (`<think>`) and the template shows the answer without a block;
            False raises a ValueError.

    Raises:
        ValueError: The template fails, renders an answer that does not follow its own generation
            prompt, ends an answer without one of the model's end tokens, or leaves out the tools,
            or a message's tool calls or thinking; or an answer contains an end token.
    """
    assert tokenizer.chat_template is not None
    ends = answer_ends(tokenizer)
    messages, spelled = without_special_tokens(tokenizer, messages, list(tools))
    tools = with_signs(list(tools), spelled)
    text_of = functools.partial(
        render,
        tokenizer.chat_template,
        bos_token=tokenizer.bos,
        eos_token=tokenizer.eos,
        now=TRAINING_DAY,
        source=f"the chat template of {tokenizer.name}",
        **({"tools": tools} if tools else {}),
    )
    encode = GrowingIds(tokenizer, spelled).encode
    examples: list[Example] = []
    ids: list[int] = []
    loss_mask: list[bool] = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = text_of(messages[:turn], add_generation_prompt=True)
        text = text_of(messages[: turn + 1], add_generation_prompt=False)
        opened = re.search(r"<think>\s*$", prompt)
        if opened and not text.startswith(prompt) and text.startswith(prompt[: opened.start()]):
            begun = text[opened.start() :].lstrip()
            if begun.startswith("<think>"):  # a second thought would be put before its own
                raise ValueError(
                    f"message {turn + 1} begins with {begun[:20]!r}, the chat template of "
                    f"{tokenizer.name} with {opened[0]!r}: give its thought the same white space"
                )
            if not close_thoughts:
                raise ValueError(
                    f"the chat template of {tokenizer.name} opens <think> before message "
                    f"{turn + 1}, and shows it without: pass --data.close-thoughts, which puts an "
                    "empty thought there"
                )
            text = f"{prompt}\n</think>\n\n{begun}"
        if not text.startswith(prompt):
            raise ValueError(
                f"the chat template of {tokenizer.name} shows message {turn + 1} otherwise than "
                "it asks for it: give the model a template whose answers follow its generation "
                "prompt"
            )
        _check_shown(tokenizer.name, prompt, text, message, turn, tools)
        before, whole = encode(prompt), encode(text)
        follows = whole[: len(before)] == before
        answer = (
            whole[len(before) :] if follows else tokenizer.rendered(text[len(prompt) :], spelled)
        )
        length = next((index + 1 for index, token in enumerate(answer) if token in ends), None)
        if length is None:
            raise ValueError(
                f"the chat template of {tokenizer.name} ends message {turn + 1} with none of the "
                f"model's end tokens (ids {sorted(ends)}), so it would not learn to stop: name the "
                "one that it ends with, --data.end-token, or add its eos_token to the template"
            )
        rest = answer[length:]
        if ends & set(rest) and tokenizer.decode([i for i in rest if i not in ends]).strip():
            raise ValueError(
                f"message {turn + 1} spells a token that ends an answer, the rest would be lost: "
                "rewrite it"
            )
        if before[: len(ids)] != ids:  # earlier turns are rendered or tokenised otherwise now
            examples.append(Example(ids, loss_mask))
            loss_mask = []
        unseen = len(before) - len(loss_mask)
        ids = before + answer[:length]
        learned = in_loss is None or in_loss[turn]
        loss_mask = loss_mask + [False] * unseen + [learned] * length
    return [*examples, Example(ids, loss_mask)]


def answer_ends(tokenizer: "Tokenizer") -> frozenset[int]:
    """Return the ids of the tokens that may end an answer: stop tokens and the separator."""
    return frozenset({*getattr(tokenizer, "stop_ids", ()), tokenizer.separator})


def _check_shown(
    name: str, prompt: str, text: str, message: Message, turn: int, tools: Sequence[Any]
) -> None:
    """Raise a ValueError if a template leaves out tools, or a message's tool calls or thinking."""
    parts = [
        ("a tool", str(function["name"]), prompt)
        for tool in tools
        if isinstance(tool, Mapping)
        and isinstance(function := tool.get("function", tool), Mapping)
        and "name" in function
    ]
    answer = text[len(prompt) :]
    for call in message.get("tool_calls", ()):
        parts.append(("a tool call", call.get("function", call)["name"], answer))
    thought, closed, _ = message["content"].rpartition("</think>")
    if closed:
        parts.append(("the thought", thought.rpartition("<think>")[2].strip(), answer))
    for field in ("reasoning_content", "reasoning", "thinking"):
        if message.get(field):
            parts.append((field, str(message[field]).strip(), answer))
    for what, shown, where in parts:
        if shown not in where:
            raise ValueError(
                f"the chat template of {name} does not show {what} of message {turn + 1} "
                f"({shown[:40]!r}): take it out, or give the model a template that does"
            )


def text_example(
    prompt_ids: Callable[[str], list[int]],
    encode: Callable[[str], list[int]],
    prompt: str,
    completion: str,
    end: int,
) -> Example:
    """Tokenise a prompt and its completion as plain text; the loss covers completion and end token.

    The ids of the prompt are those that generation sees, as in `chat_examples`.

    Args:
        prompt_ids: Function that encodes a prompt for generation, to at least one token id.
        encode: Function that encodes a continuation, without special tokens.
        prompt: Text of the prompt.
        completion: Text that follows the prompt.
        end: Token id that ends the completion.
    """
    before = prompt_ids(prompt)
    whole = prompt_ids(prompt + completion)
    follows = whole[: len(before)] == before
    answer = [*(whole[len(before) :] if follows else encode(completion)), end]
    return Example(before + answer, [False] * len(before) + [True] * len(answer))


def render(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    now: datetime.datetime | None = None,
    source: str = "the chat template",
    **variables: Any,
) -> str:
    """Render a Jinja chat template with Hugging Face's conventions.

    A template comes with the files of a model, so it is not trusted: it gets plain copies of the
    messages, cannot change the messages or reach Python's internals, and has limits on work and
    memory (`template_limits`).

    Args:
        template: Jinja template. It may use `raise_exception(text)`, `strftime_now(format)`, the
            filter `tojson`, `break` and `continue`; `{% generation %}` is rendered as its content.
        messages: Messages, each with `role` and `content`.
        add_generation_prompt: Whether the text ends with the generation prompt, which opens the
            model's answer.
        now: Date and time that `strftime_now` formats; None takes the current time.
        source: Name of the template in error messages.
        variables: Other variables of the template, such as `bos_token` or `tools`. Those that are
            None are undefined, except for `tools` and `documents`, which are None by default.

    Raises:
        ValueError: The template has a mistake, tries to leave the sandbox, exceeds its limits or
            refuses the messages; or jinja2 is not installed.
    """
    given, characters = _plain(messages, variables)
    strftime_now = _strftime(now or datetime.datetime.now())
    limits = _limits()  # outside of try: a missing package is no error of the template
    try:
        with limits.limited(given, characters):
            return _compiled(template).render(
                given, add_generation_prompt=add_generation_prompt, strftime_now=strftime_now
            )
    except Exception as error:  # a template can raise whatever Python can
        why = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise ValueError(f"{source} fails: {why[:300]}") from error


def _plain(messages: Sequence[Message], variables: Mapping[str, Any]) -> tuple[Any, int]:
    """Copy the variables of a template as JSON, and count the characters."""
    given = {"messages": list(messages), "tools": None, "documents": None}
    text = json.dumps(given | {n: value for n, value in variables.items() if value is not None})
    return json.loads(text), len(text)


def _strftime(moment: datetime.datetime) -> Callable[[str], str]:
    def strftime_now(form: str) -> str:  # not a bound method, which would lead to more
        if len(form) > 100:
            raise ValueError(f"strftime_now takes up to 100 characters, not {len(form)}")
        return moment.strftime(form)

    return strftime_now


@functools.lru_cache(maxsize=8)
def _compiled(template: str):
    return _environment().from_string(template)


@functools.cache
def _environment():
    return _limits().LimitedEnvironment()


def _limits():
    try:
        from train.data import template_limits
    except ImportError:
        raise ValueError(f"chat templates need jinja2: {INSTALL}") from None
    return template_limits
