"""Chat templates: messages to the text that a model was tuned to answer; rendered in a sandbox."""

import dataclasses
import datetime
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer

Message = Mapping[str, Any]
INSTALL = 'pip install "jinja2>=3.1.6", or the extra "pretrained"'

TRAINING_DAY = datetime.datetime(2026, 1, 1)
"""What templates that ask for the date are told in training, so that a run that goes on tomorrow
has the same rows."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A text to train on.

    Attributes:
        ids: of its tokens.
        supervised: for each, whether the assistant wrote it: its content, or the end after that.
    """

    ids: list[int]
    loss_mask: list[bool]


def chat_ids(tokenizer: "PretrainedTokenizer", messages: Sequence[Message]) -> list[int]:
    """Ids of a conversation up to where the model's answer begins.

    Raises:
        ValueError: the tokenizer has no chat template, or it fails (see `render`).
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{tokenizer.name} has no chat template: leave out --chat to continue text"
        )
    text = render(
        tokenizer.chat_template, messages, bos_token=tokenizer.bos, eos_token=tokenizer.eos
    )
    return tokenizer.rendered(text)


def chat_examples(tokenizer: "PretrainedTokenizer", messages: Sequence[Message]) -> list[Example]:
    """A conversation as the model meets it when it answers, with its answers supervised.

    In front of each answer stand exactly the ids of `chat_ids`; behind them the answer's own, up to
    and with the first token that ends it. An id that would span both is not made: the answer is
    then encoded alone.

    Mostly this is one text for the whole conversation. A template may show an earlier answer
    differently once there is a later turn (without its thoughts, say), or its text may be cut into
    other ids; what the model then reads is another text, and a new example begins.

    Args:
        tokenizer: with a chat template.
        messages: at least one of the role "assistant".

    Raises:
        ValueError: the template fails, shows an answer that does not follow its own invitation to
            answer, or ends an answer with none of the model's end tokens.
    """
    assert tokenizer.chat_template is not None
    ends = {*tokenizer.stop_ids, tokenizer.separator}
    fill = functools.partial(
        render,
        tokenizer.chat_template,
        bos_token=tokenizer.bos,
        eos_token=tokenizer.eos,
        now=TRAINING_DAY,
    )
    examples: list[Example] = []
    ids: list[int] = []
    loss_mask: list[bool] = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = fill(messages=messages[:turn])
        text = fill(messages=messages[: turn + 1], add_generation_prompt=False)
        if not text.startswith(prompt):
            raise ValueError(
                f"the chat template of {tokenizer.name} shows message {turn + 1} otherwise than "
                "it asks for it: give the model a template whose answers follow its generation "
                "prompt"
            )
        before = tokenizer.rendered(prompt)
        whole = tokenizer.rendered(text)
        follows = whole[: len(before)] == before
        answer = whole[len(before) :] if follows else tokenizer.rendered(text[len(prompt) :])
        length = next((place + 1 for place, token in enumerate(answer) if token in ends), None)
        if length is None:
            raise ValueError(
                f"the chat template of {tokenizer.name} ends message {turn + 1} with none of the "
                f"model's end tokens (ids {sorted(ends)}), so it would not learn to stop: add its "
                "eos_token to the template"
            )
        rest = answer[length:]
        if ends & set(rest) and tokenizer.decode([i for i in rest if i not in ends]).strip():
            raise ValueError(
                f"message {turn + 1} spells a token that ends an answer, the rest would be lost: "
                "rewrite it"
            )
        if before[: len(ids)] != ids:  # the past reads otherwise now
            examples.append(Example(ids, loss_mask))
            loss_mask = []
        unseen = len(before) - len(loss_mask)
        ids = before + answer[:length]
        loss_mask = loss_mask + [False] * unseen + [True] * length
    return [*examples, Example(ids, loss_mask)]


def text_example(
    prompt_ids: Callable[[str], list[int]],
    encode: Callable[[str], list[int]],
    prompt: str,
    completion: str,
    end: int,
) -> Example:
    """A prompt and its completion as plain text, with the completion and the end supervised.

    The ids of the prompt stay what generation reads, as in `chat_examples`.

    Args:
        prompt_ids: ids of a text to be continued, at least one.
        encode: ids of a text that follows another.
        end: id after which a text is over.
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
    **variables: Any,
) -> str:
    """A Jinja chat template of Hugging Face's conventions, filled in.

    A template comes with the weights, so it is not trusted: it sees plain copies of the messages,
    can't change them, and reaches no attribute of Python's own.

    Args:
        template: in Jinja; knows `raise_exception(text)`, `strftime_now(format)`, the filter
            `tojson`, `break` and `continue`; `{% generation %}` marks nothing here.
        messages: each with `role` and `content`.
        add_generation_prompt: end where the answer begins.
        now: what a template that asks for the date is told; the present if not given.
        variables: others that the template knows, such as `bos_token` or `tools`.

    Raises:
        ValueError: the template is wrong, tries to leave the sandbox, or refuses the messages.
    """
    seen = json.loads(json.dumps({"messages": list(messages), **variables}))
    moment = now or datetime.datetime.now()
    _environment()  # outside: a missing package is no fault of the template
    try:
        return _compiled(template).render(
            seen,
            add_generation_prompt=add_generation_prompt,
            strftime_now=lambda form: moment.strftime(form),  # a bound method would lead to more
        )
    except Exception as error:  # a template can raise whatever Python can
        why = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise ValueError(f"the chat template fails: {why}") from error


@functools.lru_cache(maxsize=8)
def _compiled(template: str):
    return _environment().from_string(template)


@functools.cache
def _environment():
    try:
        import jinja2.ext
        import jinja2.sandbox
    except ImportError:
        raise ValueError(f"chat templates need jinja2: {INSTALL}") from None

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` around answers: a mark for training that renders as its content."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any):
    """As Hugging Face's: Jinja's own would escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _refuse(message: str):
    raise ValueError(message)
