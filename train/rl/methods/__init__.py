"""Methods of reinforcement learning by name, one file each: `--method "dapo(clip_high=0.3)"`."""

from tyro.constructors import PrimitiveConstructorSpec, PrimitiveTypeInfo

from train.cli.calls import from_text, text_of
from train.cli.command import OPTIONS, one_word
from train.rl.methods.dapo import DAPO
from train.rl.methods.dr_grpo import DrGRPO
from train.rl.methods.grpo import GRPO
from train.rl.methods.method import Method
from train.rl.methods.rebn import ReBN
from train.rl.methods.reinforce_pp import ReinforcePP
from train.rl.methods.rloo import RLOO
from train.rl.methods.trigger import TriggerGRPO

__all__ = [
    "DAPO",
    "GRPO",
    "METHODS",
    "RLOO",
    "DrGRPO",
    "Method",
    "ReBN",
    "ReinforcePP",
    "TriggerGRPO",
    "method_from_text",
]

METHODS: dict[str, type[Method]] = {
    method.word: method for method in (GRPO, DrGRPO, RLOO, DAPO, ReinforcePP, ReBN, TriggerGRPO)
}


def method_from_text(text: str) -> Method:
    """The method that a text asks for, e.g. `grpo` or `dapo(clip_high=0.3, kl=0.01)`.

    Raises:
        ValueError: There is no such method or option, or a value that it can't have.
    """
    method = from_text(text, METHODS, "method")
    if METHODS.get(method.word) is not type(method):
        raise ValueError(
            f"method {text!r}: {type(method).__name__} has the word {method.word!r} of another "
            "method: give it one of its own, the name that it has in METHODS"
        )
    return method


@OPTIONS.primitive_rule
def method_option(option: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """A method is one option, written as a call."""
    if Method not in getattr(option.type, "__args__", ()):
        return None
    show = lambda method: text_of(method.word, method) if method else "None"  # noqa: E731
    return one_word(option, (Method, str), "METHOD", method_from_text, show)
