"""Adapter of models to the interface of EleutherAI's evaluation harness (the extra `lm-eval`).

From Python: lm_eval.simple_evaluate(HarnessModel(model="smollm2"), tasks=...).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from thoughtbubbles.decoding import generate
from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from train.cli.plugins import OPTION, load_plugins
from train.data.chat_templates import Message, render
from train.data.spelled import fixed_signs, messages_with_signs
from train.evaluation.scoring import Scorer
from train.models.load import LanguageModel, load_model, load_weights

try:
    from lm_eval.api import model as harness  # pyright: ignore[reportMissingImports]
except ImportError:
    harness = None  # without the harness, this module can be imported but not used

LM: Any = object if harness is None else harness.LM
INSTALL = 'the evaluation harness is not installed: pip install lm_eval, or the extra "lm-eval"'
MAX_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Decoding options of a request, from the harness's `generation_kwargs`.

    Attributes:
        until: Stop strings; a generated text is truncated before the first stop string in it.
        max_new_tokens: Maximum number of new tokens.
        temperature: Sampling temperature; 0 decodes greedily.
        top_k: Number of most probable tokens to sample from; None samples from all.
        top_p: Probability mass of the most probable tokens to sample from; None samples from all.
        min_p: Minimum probability of a token to sample, relative to that of the most probable
            token; None samples from all.
    """

    until: tuple[str, ...] = ()
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    @classmethod
    def from_options(cls, options: Mapping[str, Any], max_new_tokens: int) -> "Decoding":
        """Read the decoding options of a task.

        Args:
            options: Dict `generation_kwargs` of the harness: `until`, `do_sample`, `temperature`,
                `max_gen_toks` or another name in `MAX_NEW_TOKENS`, `top_k`, `top_p`, `min_p`.
            max_new_tokens: Maximum number of new tokens if the options set no maximum.

        Raises:
            ValueError: An option is not known.
        """
        left = dict(options)
        until = left.pop("until", None) or []
        until = [until] if isinstance(until, str) else until
        lengths = [left.pop(name, None) for name in MAX_NEW_TOKENS]
        length = next((n for n in lengths if n is not None), max_new_tokens)
        temperature = left.pop("temperature", None)
        sampled = left.pop("do_sample", None)
        if sampled is None:
            sampled = bool(temperature)
        if temperature is None:
            temperature = 1.0
        filters = {name: left.pop(name, None) for name in ("top_k", "top_p", "min_p")}
        if left:
            raise ValueError(
                f"generation option {next(iter(left))} is not supported: choose of until, "
                f"do_sample, temperature, {', '.join(filters)}, {MAX_NEW_TOKENS[0]}"
            )
        if not sampled:
            return cls(tuple(filter(None, until)), int(length))
        return cls(tuple(filter(None, until)), int(length), float(temperature), **filters)


class HarnessModel(LM):
    """Language model for the harness: log-probabilities of continuations, and generated texts.

    Args:
        model: Pretrained weights: "smollm2", a Hugging Face folder, or a .gguf file.
        checkpoint: Folder of a run, in place of `model`.
        lm: Loaded model, in place of `model` and `checkpoint`.
        batch_size: Number of rows of a forward pass; "auto" stands for 16.
        max_length: Maximum number of tokens per row; by default the context length that the model
            was trained with.
        max_gen_toks: Maximum number of new tokens in tasks that don't set a maximum.
        seed: Seed of the sampling noise.
        chat: Whether contexts are conversations rendered by the model's chat template. Special
            tokens of the template are then encoded as special tokens, and no token is prepended.
            `chat` must be set if, and only if, the harness is called with `apply_chat_template`.
        plugin: Names of modules, separated by "+", that are imported before the model is loaded,
            such as one that defines a run's fork policy (as `thoughtbubbles harness --plugin`).
        device: Option that the harness passes to every model; jax chooses the device.
        max_batch_size: Option that the harness passes to every model, without effect.

    Raises:
        ValueError: The harness is not installed, not exactly one model is given, a plugin can't be
            imported, or `chat` is set for a model without a chat template.
    """

    def __init__(
        self,
        model: str | None = None,
        checkpoint: str | None = None,
        lm: LanguageModel | None = None,
        batch_size: int | str = 16,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        chat: bool = False,
        plugin: str = "",
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        if harness is None:
            raise ValueError(INSTALL)
        super().__init__()
        del device, max_batch_size
        if sum(given is not None for given in (model, checkpoint, lm)) != 1:
            raise ValueError(f"model={model} checkpoint={checkpoint}: pass one of them")
        if plugin:
            load_plugins([OPTION, *plugin.split("+")])
        if model is not None:
            lm = load_weights(model).for_inference()
        elif checkpoint is not None:
            lm = load_model(checkpoint)
        assert lm is not None
        self._name = model or checkpoint or lm.tokenizer.name
        self._lm, self._seed, self._max_gen_toks = lm, seed, max_gen_toks
        self.batch_size = 16 if str(batch_size).startswith("auto") else int(batch_size)
        self._scorer = Scorer(lm, self.batch_size, max_length)
        self._chat = chat
        self._signs: dict[str, str] = {}
        if chat:
            self._signs = fixed_signs(self._chat_tokenizer())
            self._scorer.encode = chat_encoder(self._chat_tokenizer(), self._signs)
        self._stops: dict[str, list[int]] = {}

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Score the continuation of each request after its context.

        Returns:
            Pairs: the log-probability in nats, and whether greedy decoding gives the continuation.
        """
        self._scorer.quiet = disable_tqdm
        scores = self._scorer([request.args for request in requests])
        return self._done("loglikelihood", requests, [(s.log_prob, s.greedy) for s in scores])

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Compute the log-probability of each request's whole text, in nats."""
        self._scorer.quiet = disable_tqdm
        scores = self._scorer.rolling([request.args[0] for request in requests])
        return self._done("loglikelihood_rolling", requests, [s.log_prob for s in scores])

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate a continuation of each request's context, up to the request's first stop string.

        Decoding stops early only at a token that contains a stop string. If a stop string spans
        several tokens, decoding continues, and the text is truncated afterwards.
        """
        del disable_tqdm
        groups: dict[Decoding, list[int]] = {}
        for index, request in enumerate(requests):
            decoding = Decoding.from_options(request.args[1], self._max_gen_toks)
            groups.setdefault(decoding, []).append(index)
        found = [""] * len(requests)
        for decoding, members in groups.items():
            prompts = {index: self._prompt(requests[index].args[0], decoding) for index in members}
            members.sort(key=lambda index: -len(prompts[index]))
            for first in range(0, len(members), self.batch_size):
                batch = members[first : first + self.batch_size]
                seed = self._seed + first  # equal prompts of other batches get other samples
                texts = self._continue([prompts[index] for index in batch], decoding, seed)
                for index, text in zip(batch, texts, strict=True):
                    found[index] = text
        return self._done("generate_until", requests, found)

    def apply_chat_template(
        self, chat_history: Sequence[Message], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation with the model's chat template.

        Special tokens that messages spell out are plain text, except for the assistant's: in the
        rendered text, private-use characters stand for them.

        Args:
            chat_history: Messages, the oldest first.
            add_generation_prompt: Whether the text ends with the tokens that open the model's
                answer. Otherwise the text ends with the content of the last message.

        Raises:
            ValueError: The model has no chat template, or was not loaded with `chat=True`; or a
                message has one of these private-use characters.
        """
        tokenizer = self._chat_tokenizer()
        messages = messages_with_signs(chat_history, self._signs)
        text = render(
            tokenizer.chat_template or "",
            messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=tokenizer.bos,
            eos_token=tokenizer.eos,
            source=f"the chat template of {tokenizer.name}",
        )
        if add_generation_prompt:
            return text
        last = str(messages[-1]["content"]).strip()
        return text[: text.rindex(last) + len(last)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template for the harness's reports, or None if `chat_template` is false."""
        return self._chat_tokenizer().chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, which the harness uses in the names of its request caches."""
        return self._lm.tokenizer.name.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Return the name and number of parameters that the harness writes into its results."""
        return {"model": self._name, "model_num_parameters": self._lm.model.config.num_params()}

    def _chat_tokenizer(self) -> PretrainedTokenizer:
        """Return the tokenizer; raise a ValueError without a chat template or `chat=True`."""
        tokenizer = self._lm.tokenizer
        if not isinstance(tokenizer, PretrainedTokenizer) or tokenizer.chat_template is None:
            raise ValueError(
                f"{self._name} has no chat template: leave out apply_chat_template and chat"
            )
        if not self._chat:
            raise ValueError(
                f"apply_chat_template, and {self._name} was loaded with chat=False: add chat=True "
                "(to --model_args), so that rendered special tokens are encoded as such"
            )
        return tokenizer

    def _prompt(self, context: str, decoding: Decoding) -> list[int]:
        """Encode a context, truncated on the left so that new tokens fit into `max_length`."""
        ids, longest = self._scorer.encode(context), self._scorer.max_length
        if longest is None:
            return ids
        if decoding.max_new_tokens >= longest:
            raise ValueError(
                f"max_gen_toks={decoding.max_new_tokens} of max_length={longest} leaves no tokens "
                "for a context: lower it"
            )
        return ids[-(longest - decoding.max_new_tokens) :]

    def _continue(self, prompts: list[list[int]], decoding: Decoding, seed: int) -> list[str]:
        lm, options = self._lm, dataclasses.asdict(decoding)
        until, length = options.pop("until"), options.pop("max_new_tokens")
        stop = [*lm.stop_ids, *(token for text in until for token in self._stop_ids(text))]
        valid_vocab_size = lm.tokenizer.vocab_size
        # Padded, so that the last batch finds its program compiled.
        padded = prompts + prompts[-1:] * (self.batch_size - len(prompts))
        new = generate(
            lm.model,
            padded,
            length,
            stop=stop,
            valid_vocab_size=valid_vocab_size,
            seed=seed,
            **options,
        )
        texts = [lm.tokenizer.decode(ids) for ids in new[: len(prompts)]]
        return [cut(text, until) for text in texts]

    def _stop_ids(self, text: str) -> list[int]:
        """Return the ids of tokens that contain a stop string, or are spelled like this string."""
        if text not in self._stops:
            tokenizer = self._lm.tokenizer
            ids = range(tokenizer.vocab_size)
            found = [token for token in ids if text in tokenizer.decode([token])]
            if isinstance(tokenizer, PretrainedTokenizer):
                spelled = tokenizer.rendered(text)
                found += spelled if len(spelled) == 1 else []
            self._stops[text] = found
        return self._stops[text]

    def _done(self, kind: str, requests: Sequence[Any], results: list[Any]) -> list[Any]:
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial(kind, request.args, result)
        return results


def chat_encoder(
    tokenizer: PretrainedTokenizer, spelled: Mapping[str, str]
) -> Callable[[str], list[int]]:
    """Return a function that encodes rendered chat templates, in which special tokens are special.

    An empty text is encoded as the separator.

    Args:
        tokenizer: Tokenizer of the model.
        spelled: Mapping from a sign, one character, to the special token that is plain text there.
    """
    return lambda text: tokenizer.rendered(text, spelled) or [tokenizer.separator]


def cut(text: str, until: Sequence[str]) -> str:
    """Truncate a text before the first of the stop strings `until` that it contains."""
    starts = [text.find(stop) for stop in until]
    return text[: min((start for start in starts if start >= 0), default=len(text))]
