"""Prompts and observations as ids, responses as text."""

import dataclasses
import itertools
from collections.abc import Sequence

from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from train.data.chat_templates import chat_ids
from train.models.load import LanguageModel
from train.rl.rollout.sampler import Sampled
from train.rl.types import Completion, Problem


def has_chat_template(lm: LanguageModel) -> bool:
    """Whether `sft` renders the conversations of a model in a chat template."""
    tokenizer = lm.tokenizer
    return isinstance(tokenizer, PretrainedTokenizer) and tokenizer.chat_template is not None


@dataclasses.dataclass(frozen=True)
class PromptFormatter:
    """Translation of texts to ids and back.

    Attributes:
        lm: Language model whose tokenizer is used.
        chat: Whether prompts are messages to the model, in its chat template.
    """

    lm: LanguageModel
    chat: bool = False

    def prompt(self, messages: Sequence[str]) -> list[int]:
        """Ids of a conversation of user, policy, user and so on, up to the policy's response."""
        if not self.chat:
            return self.lm.prompt("".join(messages))
        tokenizer = self.lm.tokenizer
        if not isinstance(tokenizer, PretrainedTokenizer):
            raise ValueError("chat=True needs weights with a chat template: leave chat out")
        roles = itertools.cycle(("user", "assistant"))
        said = [
            {"role": role, "content": text} for role, text in zip(roles, messages, strict=False)
        ]
        return chat_ids(tokenizer, said)

    def observation(self, text: str, limit: int) -> list[int]:
        """Ids of an observation in the middle of a text, at most `limit` of them."""
        return self.lm.tokenizer.encode(text)[0].tolist()[:limit]

    def cut(self, text: str, limit: int) -> str:
        """Text of the first `limit` ids of an observation."""
        return self.lm.tokenizer.decode(self.observation(text, limit))

    def completion(self, problem: Problem, sampled: Sampled) -> Completion:
        """A sampled response as text."""
        ids = sampled.tokens.tolist()
        finished = bool(ids) and ids[-1] in self.lm.stop_ids
        text = self.lm.tokenizer.decode(ids[:-1] if finished else ids)
        return Completion(problem, text, tuple(ids), finished)
