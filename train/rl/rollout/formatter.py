"""Translation of prompts and observations to token ids, and of responses to texts."""

import dataclasses
import itertools
from collections.abc import Sequence

from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from train.data.chat_templates import chat_ids
from train.models.load import LanguageModel
from train.rl.rollout.sampler import Sampled
from train.rl.types import Completion, Problem


def has_chat_template(lm: LanguageModel) -> bool:
    """Return whether a model has a chat template, with which `sft` renders conversations."""
    tokenizer = lm.tokenizer
    return isinstance(tokenizer, PretrainedTokenizer) and tokenizer.chat_template is not None


@dataclasses.dataclass(frozen=True)
class PromptFormatter:
    """Formatter that translates texts to token ids and back.

    Attributes:
        lm: Language model whose tokenizer is used.
        chat: Whether prompts are rendered as messages in the model's chat template.
    """

    lm: LanguageModel
    chat: bool = False

    def prompt(self, messages: Sequence[str]) -> list[int]:
        """Encode a conversation as the prompt of the policy's next response.

        Args:
            messages: Texts of the user and of the policy in alternation; the first is the user's.

        Raises:
            ValueError: `chat` is True and the tokenizer is not that of a pretrained model.
        """
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
        """Encode an observation as the continuation of a text, truncated to `limit` ids."""
        return self.lm.tokenizer.encode(text)[0].tolist()[:limit]

    def cut(self, text: str, limit: int) -> str:
        """Truncate an observation to its first `limit` ids, and return it as a text."""
        return self.lm.tokenizer.decode(self.observation(text, limit))

    def completion(self, problem: Problem, sampled: Sampled) -> Completion:
        """Decode a sampled response into a completion of the problem."""
        ids = sampled.tokens.tolist()
        finished = bool(ids) and ids[-1] in self.lm.stop_ids
        text = self.lm.tokenizer.decode(ids[:-1] if finished else ids)
        return Completion(problem, text, tuple(ids), finished)
