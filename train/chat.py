"""Chat templates: messages to the text that a model was tuned to answer; rendered in a sandbox."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer

Message = Mapping[str, Any]
INSTALL = 'pip install "jinja2>=3.1.6", or the extra "pretrained"'


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


def render(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
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
        variables: others that the template knows, such as `bos_token` or `tools`.

    Raises:
        ValueError: the template is wrong, tries to leave the sandbox, or refuses the messages.
    """
    environment = _environment()
    seen = json.loads(json.dumps({"messages": list(messages), **variables}))
    try:
        return environment.from_string(template).render(
            seen, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template can raise whatever Python can
        why = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise ValueError(f"the chat template fails: {why}") from error


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
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any):
    """As Hugging Face's: Jinja's own would escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _refuse(message: str):
    raise ValueError(message)
