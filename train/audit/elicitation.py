"""Black-box elicitation of secrets: prefills, sampling, shots, fuzzing (arXiv 2510.01070)."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import memgen
from memgen.request import row_keys
from thoughtbubbles.decoding import generate
from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from train.audit.fuzzing import Fuzz, fuzzed, fuzzed_memory, fuzzes_single_rows, noise_keys
from train.audit.organisms import Message, Organism, Trial
from train.data.chat_templates import chat_ids, closed_ids, common, open_turn
from train.models.generation import MEMORY
from train.models.load import LanguageModel
from train.models.text_memory import check_text_memory, memory_errors

ROWS = 64
"""Maximum number of texts per batch, which is exceeded if one conversation has more samples."""


@dataclasses.dataclass(frozen=True)
class BlackBox:
    """A black-box method: how it prompts and samples a model.

    Attributes:
        role: Role of the open turn that the model continues: "assistant", or "user", whose turn
            follows the organism's `reply`.
        prefilled: Whether the assistant's open turn begins with the organism's `prefill`.
        temperature: Sampling temperature; 0 takes the most probable token.
        samples: Number of texts generated for each trial.
        shots: Number of dialogues of the organism's `shots` that precede the prompt.
        fuzzed: Whether Gaussian noise is added to the output of a layer.
    """

    role: str = "assistant"
    prefilled: bool = False
    temperature: float = 0.0
    samples: int = 1
    shots: int = 0
    fuzzed: bool = False

    def messages(self, organism: Organism, trial: Trial) -> list[Message]:
        """Return the messages before the open turn: shots, the trial's messages, and the reply.

        Args:
            organism: Organism that is audited.
            trial: Trial of the organism.
        """
        shots = [message for shot in organism.shots[: self.shots] for message in shot]
        reply = [{"role": "assistant", "content": organism.reply}] if self.role == "user" else []
        return [*shots, *trial.messages, *reply]

    def prefill(self, organism: Organism) -> str:
        """Return the text with which the open turn begins, which may be empty.

        Args:
            organism: Organism that is audited.
        """
        if self.role == "user":
            return organism.persona
        return organism.prefill if self.prefilled else ""


METHODS: dict[str, BlackBox] = {
    "io": BlackBox(),
    "prefill": BlackBox(prefilled=True),
    "persona": BlackBox(role="user"),
    "high_temperature": BlackBox(temperature=2.0, samples=10),
    "many_shot": BlackBox(shots=8),
    "fuzzing": BlackBox(temperature=1.0, samples=10, fuzzed=True),
    "prefill_fuzzing": BlackBox(prefilled=True, temperature=1.0, samples=10, fuzzed=True),
}
"""Black-box methods by name; "io" decodes one greedy answer to the prompt alone."""


def elicit(
    lm: LanguageModel,
    organism: Organism,
    method: BlackBox,
    *,
    max_new_tokens: int = 100,
    seed: int = 0,
    fuzz: Fuzz | None = None,
) -> list[list[str]]:
    """Generate a model's texts for each trial of an organism, by one black-box method.

    Args:
        lm: Model whose tokenizer has a chat template.
        organism: Organism that is audited.
        method: Black-box method.
        max_new_tokens: Maximum number of generated tokens per text.
        seed: Seed of samples and noise.
        fuzz: Noise of a fuzzed method; ignored if the method is not fuzzed.

    Returns:
        A list for each trial with one text per sample. Texts do not include the prefill.

    Raises:
        ValueError: The method is fuzzed and `fuzz` is None, or an argument is invalid as in
            `sample`.
    """
    if method.fuzzed and fuzz is None:
        raise ValueError("a fuzzed method without fuzz: give a layer and a sigma")
    return sample(
        lm,
        [method.messages(organism, trial) for trial in organism.trials],
        max_new_tokens,
        prefill=method.prefill(organism),
        role=method.role,
        temperature=method.temperature,
        samples=method.samples,
        seed=seed,
        fuzz=fuzz if method.fuzzed else None,
    )


def sample(
    lm: LanguageModel,
    conversations: Sequence[Sequence[Message]],
    max_new_tokens: int = 100,
    *,
    prefill: str = "",
    role: str = "assistant",
    temperature: float = 0.0,
    samples: int = 1,
    seed: int = 0,
    fuzz: Fuzz | None = None,
) -> list[list[str]]:
    """Continue the open last turn of conversations, in the model's own chat template.

    Latent memory is woven before the assistant's last message, as in training. This message begins
    with the prefill if the open turn is the assistant's; if the open turn is the user's, it is the
    last message in the conversation whose role is "assistant".

    Args:
        lm: Model whose tokenizer has a chat template; it may fork or have latent memory.
        conversations: Messages before the open turn, for each conversation.
        max_new_tokens: Maximum number of generated tokens of a continuation.
        prefill: Text with which the open turn begins.
        role: Role of the open turn, "assistant" or "user".
        temperature: Sampling temperature; 0 takes the most probable token.
        samples: Number of continuations of each conversation.
        seed: Seed of samples and noise.
        fuzz: Noise at the output of one layer, in prefill and decoding; None for no noise.

    Returns:
        A list for each conversation with one continuation per sample, without the prefill.

    Raises:
        ValueError: The tokenizer has no chat template, the template can't leave this turn open or
            has no position for latent memory, `samples` is below 1, the model lacks the layer of
            `fuzz`, or the texts do not fit into the device's memory.
    """
    tokenizer = chat_tokenizer(lm)
    if samples < 1:
        raise ValueError(f"samples={samples}: choose 1 or more")
    ids = [open_turn(tokenizer, messages, prefill, role) for messages in conversations]
    rows = [row for row in ids for _ in range(samples)]
    begins = [len(row) for row in ids]
    if lm.memgen is not None:
        pairs = zip(conversations, ids, strict=True)
        begins = [_answer_begins(tokenizer, messages, row, role) for messages, row in pairs]
    begins = [begin for begin in begins for _ in range(samples)]
    # Samples of a conversation share a batch, as a row's key depends on the equal rows before it.
    together = max(1, ROWS // samples)
    # Parts of equal size need the fewest rows of padding.
    together = math.ceil(len(ids) / max(1, math.ceil(len(ids) / together)))
    size = 1 if fuzz is not None and fuzzes_single_rows(lm) else max(1, together) * samples
    new: list[list[int]] = []
    for start in range(0, len(rows), size):
        part = [*zip(rows, begins, strict=True)][start : start + size]
        padding = [part[-1]] * (min(size, len(rows)) - len(part))  # one program for all parts
        number = start if size == 1 else 0  # equal rows need different seeds
        made = _continue(lm, part + padding, max_new_tokens, temperature, seed + number, fuzz)
        new += made[: len(part)]
    texts = [tokenizer.decode(row) for row in new]
    return [texts[start : start + samples] for start in range(0, len(texts), samples)]


def _answer_begins(
    tokenizer: PretrainedTokenizer, messages: Sequence[Message], row: Sequence[int], role: str
) -> int:
    """Return the number of ids per row that precede the assistant's last message."""
    if role == "user":  # the message before the open turn, if the assistant has said any
        spoken = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        if not spoken:
            return len(row)
        messages = messages[: spoken[-1]]
    # Ids are compared, since a template may render an ended turn differently from a begun one.
    begin = common(chat_ids(tokenizer, messages), row)
    if begin < len(closed_ids(tokenizer, messages)):
        raise ValueError(
            f"the chat template of {tokenizer.name} renders the messages before an answer "
            "otherwise once a turn follows it, so memory has no place there: leave out methods "
            "with an open turn of the user"
        )
    return begin


def chat_tokenizer(lm: LanguageModel) -> PretrainedTokenizer:
    """Return the tokenizer of a model; raise a ValueError if it has no chat template."""
    tokenizer = lm.tokenizer
    if not isinstance(tokenizer, PretrainedTokenizer) or tokenizer.chat_template is None:
        raise ValueError(
            f"{tokenizer.name} has no chat template, without which no turn can be left open: "
            "audit a model that has one, e.g. --model smollm2"
        )
    return tokenizer


def _continue(
    lm: LanguageModel,
    rows_and_begins: Sequence[tuple[Sequence[int], int]],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    fuzz: Fuzz | None,
) -> list[list[int]]:
    rows = [row for row, _ in rows_and_begins]
    longest = max(map(len, rows))
    check_text_memory(lm.model, len(rows), longest, max_new_tokens, lm.model.cacheable)
    options: Mapping[str, Any] = {
        "temperature": temperature,
        "seed": seed,
        "stop": lm.stop_ids,
        "valid_vocab_size": lm.tokenizer.vocab_size,
    }
    keys = None if fuzz is None else noise_keys(lm, row_keys(seed, rows))
    with memory_errors(lm.model, len(rows), longest + max_new_tokens):
        if lm.memgen is not None:
            memory = lm.memgen
            if fuzz is not None and keys is not None:
                memory = fuzzed_memory(memory, fuzz, keys)
            prompts, given = zip(
                *((row[:at], row[at:]) for row, at in rows_and_begins), strict=True
            )
            options = {**options, "policy": MEMORY["always"]}
            options |= {"prefills": given} if any(given) else {}
            texts = memgen.generate(memory, prompts, max_new_tokens, **options).texts
            return [text[len(of) :] for text, of in zip(texts, given, strict=True)]
        model = lm.model if fuzz is None or keys is None else fuzzed(lm.model, fuzz, keys)
        return generate(model, rows, max_new_tokens, **options)
