"""Benchmark decoding beside `transformers`, with the same model in both libraries."""

import dataclasses
import importlib
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from thoughtbubbles import Thoughtbubbles
from thoughtbubbles.decoding import generate
from thoughtbubbles.pretrained import save_pretrained
from train.benchmarks.models import SmolLM2Sizes, random_model, random_tokens
from train.benchmarks.timing import Clock, Cost, Timing, check_cpu, interleaved
from train.data.tokenizers import ByteTokenizer


@dataclasses.dataclass(frozen=True)
class TransformersBenchmark(SmolLM2Sizes):
    """Benchmark of greedy decoding beside `transformers`, which must be installed with torch.

    A model with random float32 parameters is saved, and loaded as a `LlamaForCausalLM`. For times
    of one thread, run the command under `taskset -c 0`.

    Attributes:
        prompts: Prompt lengths in tokens, each measured with one row.
        batches: Numbers of rows, each measured with prompts of the first length.
        new_tokens: Number of tokens that follow the first new token.
        repeats: Number of rounds; in each round both libraries are timed in turns. The smallest
            time is reported.
    """

    prompts: tuple[int, ...] = (32, 128, 512)
    batches: tuple[int, ...] = (4, 8, 32)
    new_tokens: int = 32
    repeats: int = 5

    def __post_init__(self):
        if min(self.new_tokens, self.repeats, *self.prompts, *self.batches) < 1:
            raise ValueError("prompts, batches, new_tokens and repeats must be 1 or more")
        if not self.prompts:
            raise ValueError("prompts is empty: name a prompt length")


def main(config: TransformersBenchmark) -> None:
    """Print CPU times of the first and of further tokens, and how many times as fast ours are."""
    check_cpu()
    torch, transformers = _installed("torch"), _installed("transformers")
    transformers.utils.logging.disable_progress_bar()
    ours = random_model(config.model_config())
    with tempfile.TemporaryDirectory() as folder:
        params = nnx.to_pure_dict(nnx.state(ours))
        save_pretrained(Path(folder) / "model", ours.config, params, ByteTokenizer())
        theirs = transformers.LlamaForCausalLM.from_pretrained(
            Path(folder) / "model", dtype=torch.float32
        ).eval()
    theirs.generation_config.eos_token_id = None
    print(
        f"{ours.config.num_params():,} parameters, float32, transformers "
        f"{transformers.__version__}, torch {torch.__version__} with {torch.get_num_threads()} "
        f"threads; CPU ms, best of {config.repeats}; in brackets times as fast as transformers"
    )
    print(f"logits differ by at most {_difference(torch, ours, theirs, config.prompts[0]):.1e}")
    print(f"rows x prompt   {'first token':>26}   {'further token':>26}")
    rows = [*((1, length) for length in config.prompts),
            *((count, config.prompts[0]) for count in config.batches)]  # fmt: skip
    for count, length in rows:
        tokens = random_tokens(config.vocab_size, count, length)
        runs: dict[str, Callable[[], Cost]] = {}
        for new in (1, 1 + config.new_tokens):
            runs[f"ours {new}"] = partial(_ours, ours, tokens.tolist(), new)
            runs[f"theirs {new}"] = partial(_theirs, torch, theirs, tokens, new)
        timing = interleaved(runs, config.repeats)
        first, further = (
            [of(timing, name, config.new_tokens) for name in ("ours", "theirs")]
            for of in (_first, _further)
        )
        cells = [f"{a:9.1f} {b:9.1f} ({b / a:.2f})" for a, b in (first, further)]
        print(f"{count:4} x {length:<8} {cells[0]:>26}   {cells[1]:>26}", flush=True)


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"{name} is not installed: pip install torch transformers, to compare with them"
        ) from error


def _ours(model: Thoughtbubbles, prompts: Sequence[Sequence[int]], new: int) -> Cost:
    clock = Clock()
    generate(model, prompts, new)
    return clock.read()


def _theirs(torch: Any, model: Any, tokens: np.ndarray, new: int) -> Cost:
    clock = Clock()
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
        )
    assert found.shape[1] == tokens.shape[1] + new
    return clock.read()


def _difference(torch: Any, ours: Thoughtbubbles, theirs: Any, length: int) -> float:
    tokens = random_tokens(ours.config.vocab_size, 1, length)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    return float(np.abs(np.asarray(ours(tokens)) - expected).max())


def _first(timing: dict[str, Timing], name: str, _: int) -> float:
    return 1e3 * timing[f"{name} 1"].best.cpu_seconds


def _further(timing: dict[str, Timing], name: str, new_tokens: int) -> float:
    later = 1e3 * timing[f"{name} {1 + new_tokens}"].best.cpu_seconds
    return (later - _first(timing, name, new_tokens)) / new_tokens
