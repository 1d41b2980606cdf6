"""Test if a tuned model still reads its prompt, with frozen or diverse names of actions in tuning.

python -m train.experiments.frozen_prompts --out frozen_prompts.jsonl
python -m train.experiments.frozen_prompts --report frozen_prompts.jsonl

This follows "Debunk the Myth of SFT Generalization" (arXiv 2510.00237), small enough for a CPU. A
decoder of two layers is first pretrained to look up names: a prompt gives each of four directions a
name, and asks for one of the names. Then the decoder is tuned to take one step on a grid: the right
answer is the prompt's name of the direction towards the target. A map assigns a name to each
direction. Arms differ in the number of different maps in their prompts (K), or in whether the
response states the direction before its name. The test "Fake" shows new names, but scores answers
by the names of the frozen map.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from thoughtbubbles import ModelConfig
from train.benchmarks.timing import Clock
from train.cli.command import run_command
from train.data.everyday_words import EVERYDAY_WORDS
from train.data.semantic_maps import MapSampler, PromptTemplate, RenderedPrompt, SemanticMap
from train.devices.mesh import MeshConfig, make_mesh, place
from train.engine.optim import OptimizerConfig
from train.engine.state import Trainable, TrainState, make_trainable
from train.engine.step import TrainStep, make_train_step
from train.experiments.study import (
    Result,
    Results,
    StudyConfig,
    by_key,
    check_names,
    markdown_table,
    mean_text,
    run_study,
    seeds_text,
)
from train.finetuning.job import sft_loss
from train.models.finetunable import FinetunableModel

KEY = ("arm", "pretraining", "steps", "prompts", "seed")
DIRECTIONS = ("up", "down", "left", "right")
SIZE = 6  # rows and columns of the grid
NEAR = 3  # maximum distance from agent to target in the states of arms with `near`
WORDS = EVERYDAY_WORDS
HELD_OUT = 40  # number of words that tuning never sees
TOKENS = {name: i for i, name in enumerate((*WORDS, *DIRECTIONS, *map(str, range(SIZE))))}
_NAMES = " ".join(f"{direction} {{{direction}}}" for direction in DIRECTIONS)
LOOKUP = PromptTemplate("lookup", (f"{_NAMES} {{wanted}}",), DIRECTIONS, ("wanted",))
POLICY = PromptTemplate("policy", (f"{_NAMES} {{state}}",), DIRECTIONS, ("state",))
WIDTH = 14  # tokens of a row: four named directions, two cells, and a response of two

BATCH = 128
MODEL = ModelConfig(vocab_size=len(TOKENS), embed_dim=64, num_layers=2, num_heads=4, mlp_dim=256)
PRETRAINING = OptimizerConfig(learning_rate=1e-3, weight_decay=0.0)
TUNING = OptimizerConfig(learning_rate=1e-3, weight_decay=0.0, warmup=0.0, final_ratio=1.0)
# All parameters but the tied embedding. At these learning rates tuning the embedding would make all
# arms forget each word that is never an answer; the embedding of a large model hardly moves.
TUNED = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("embed")))


@dataclasses.dataclass(frozen=True)
class Arm:
    """Tuning data of an arm.

    Attributes:
        maps: Number of different maps (K); None samples a new map for each example.
        thoughts: Whether the response states the direction before its name, not the name alone.
        near: Whether the agent is at most `NEAR` steps from its target in all states.
    """

    maps: int | None
    thoughts: bool = False
    near: bool = False


ARMS = {
    "frozen": Arm(1),
    **{f"K={maps}": Arm(maps) for maps in (2, 4, 8, 16, 64)},
    "diverse": Arm(None),
    "answer, frozen": Arm(1, near=True),
    "answer, diverse": Arm(None, near=True),
    "thoughts, frozen": Arm(1, thoughts=True, near=True),
    "thoughts, diverse": Arm(None, thoughts=True, near=True),
}
TESTS = ("id", "permuted", "pool", "held_out", "far", "fake")
EARLY = (25, 50, 500)  # tuning steps after which arms are scored, in addition to the last step


@dataclasses.dataclass(frozen=True)
class FrozenPrompts(StudyConfig):
    """Tunes a small decoder on frozen and on diverse names of actions, or reports its scores.

    Attributes:
        arms: Names of the arms, all by default.
        pretraining: Number of pretraining steps, in which the decoder learns to look up names.
        steps: Number of tuning steps of each arm.
        prompts: Number of prompts in each test.
    """

    arms: tuple[str, ...] = tuple(ARMS)
    pretraining: int = 1200
    steps: int = 800
    prompts: int = 256
    out: str = "frozen_prompts.jsonl"

    def __post_init__(self):
        super().__post_init__()
        check_names("arm", self.arms, ARMS)


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt, the direction whose name the prompt asks for, and the map that scores the answer.

    Attributes:
        prompt: Prompt with the names that it shows.
        direction: Direction whose name is the answer.
        scored: Map that gives the right answer: the prompt's map, except in the test "fake".
    """

    prompt: RenderedPrompt
    direction: str
    scored: SemanticMap

    def response(self, thoughts: bool) -> list[str]:
        """Return the words of the target response, with the name from the prompt's map.

        Args:
            thoughts: Whether the response states the direction before its name.
        """
        return [self.direction] * thoughts + [self.prompt.target(self.direction)]


def lookup(shown: SemanticMap, rng: np.random.Generator) -> Example:
    """Make an example that asks for the name of a random direction."""
    wanted = DIRECTIONS[rng.integers(len(DIRECTIONS))]
    return Example(LOOKUP.render(shown, wanted=wanted), wanted, shown)


def one_step(
    shown: SemanticMap,
    rng: np.random.Generator,
    keep: Callable[[int], bool] = lambda distance: True,
    scored: SemanticMap | None = None,
) -> Example:
    """Make an example that asks for one step on the grid, from a random state.

    The right direction is left or right until the agent is in the target's column, then up or down.

    Args:
        shown: Map whose names the prompt shows.
        rng: Random generator of the state.
        keep: Function from the number of steps between agent and target to whether the state is
            used. States in which the agent is at its target are never used.
        scored: Map that the answer is scored by; None for the map that the prompt shows.
    """
    while True:
        row, column, target_row, target_column = rng.integers(0, SIZE, 4)
        distance = abs(row - target_row) + abs(column - target_column)
        if distance and keep(distance):
            break
    if column != target_column:
        direction = "left" if target_column < column else "right"
    else:
        direction = "up" if target_row < row else "down"
    state = f"{row} {column} {target_row} {target_column}"
    return Example(POLICY.render(shown, state=state), direction, scored or shown)


def rows(examples: Sequence[Example], thoughts: bool) -> dict[str, np.ndarray]:
    """Encode examples as rows for `FinetunableModel.log_probs`.

    Args:
        examples: Examples, one for each of `B` rows.
        thoughts: Whether responses state the direction before its name.

    Returns:
        Arrays `[B, WIDTH]`: `tokens` int32, prompt and response, padded on the right with -1;
        `loss_mask` bool, True on the response; `segment` int32, -1 on padding and 0 elsewhere.
    """
    tokens = np.full((len(examples), WIDTH), -1, np.int32)
    loss_mask = np.zeros(tokens.shape, bool)
    for row, mask, example in zip(tokens, loss_mask, examples, strict=True):
        prompt, response = example.prompt.text.split(), example.response(thoughts)
        row[: len(prompt) + len(response)] = [TOKENS[word] for word in (*prompt, *response)]
        mask[len(prompt) : len(prompt) + len(response)] = True
    return {"tokens": tokens, "loss_mask": loss_mask, "segment": np.minimum(tokens, 0)}


def batches(arm: Arm, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield batches of `BATCH` tuning rows of an arm without end.

    Each example has its own index, from which its map is sampled.
    """
    maps = sampler(seed, arm.maps)
    for start in itertools.count(0, BATCH):
        rng = np.random.default_rng([seed, 1, start])
        keep = (lambda distance: distance <= NEAR) if arm.near else (lambda distance: True)
        found = [one_step(maps.map(0, start + i), rng, keep) for i in range(BATCH)]
        yield rows(found, arm.thoughts)


def lookups(seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield batches of `BATCH` pretraining rows without end.

    The prompts use all words, so that the pretrained model also knows the words that tuning never
    sees.
    """
    maps = MapSampler(DIRECTIONS, WORDS, seed=seed)
    for start in itertools.count(0, BATCH):
        rng = np.random.default_rng([seed, 0, start])
        yield rows([lookup(maps.map(1, start + i), rng) for i in range(BATCH)], False)


@functools.cache
def sampler(seed: int, maps: int | None) -> MapSampler:
    """Make the sampler of the maps in tuning examples.

    Args:
        seed: Seed of the maps.
        maps: Number of different maps (K), where 1 gives the frozen map; None samples a new map for
            each example.
    """
    return MapSampler(DIRECTIONS, WORDS, distinct=maps, held_out=HELD_OUT, seed=seed)


def test_sets(seed: int, count: int) -> dict[str, list[Example]]:
    """Make the examples of each test, which are the same for all arms of a seed.

    Args:
        seed: Seed of maps and states.
        count: Number of examples in each test.

    Returns:
        Mapping from the name of a test to its examples. Prompts show the frozen map ("id"), the
        names of the frozen map in another order ("permuted"), training words ("pool"), or held-out
        words ("held_out", "far" and "fake"). In "far" the agent is more than `NEAR` steps away from
        the target; in all other tests the distance is arbitrary. Answers are scored by the map that
        the prompt shows, except in "fake", where the frozen map scores them.
    """
    frozen, pool = sampler(seed, 1).map(0, 0), sampler(seed, None)

    def some(kind: str, shown: Callable[[int, np.random.Generator], SemanticMap], **how: Any):
        rng = np.random.default_rng([seed, 2, TESTS.index(kind)])
        return [one_step(shown(i, rng), rng, **how) for i in range(count)]

    def permuted(index: int, rng: np.random.Generator) -> SemanticMap:
        while True:
            names = [frozen.answers[i] for i in rng.permutation(len(DIRECTIONS))]
            if tuple(names) != frozen.answers:
                return SemanticMap("permuted", dict(zip(DIRECTIONS, names, strict=True)))

    held_out = lambda index, rng: pool.held_out_map(index)  # noqa: E731
    return {
        "id": some("id", lambda index, rng: frozen),
        "permuted": some("permuted", permuted),
        "pool": some("pool", lambda index, rng: pool.map(1, index)),
        "held_out": some("held_out", held_out),
        "far": some("far", held_out, keep=lambda distance: distance > NEAR),
        "fake": some("fake", held_out, scored=frozen),
    }


class Study:
    """Pretrained decoder of one seed and its tests; the constructor does the pretraining.

    Args:
        config: Options of the study.
        seed: Seed of parameters and data.
    """

    def __init__(self, config: FrozenPrompts, seed: int):
        self.config, self.seed = config, seed
        self.tests = test_sets(seed, config.prompts)
        self._mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        base = _trainable(PRETRAINING, config.pretraining, self._mesh, seed, nnx.Param)
        variables = nnx.state(FinetunableModel.whole(base.architecture(MODEL, rngs=nnx.Rngs(seed))))
        state = self._trained(
            make_train_step(base, 1, sft_loss), base.start(variables), lookups(seed),
            config.pretraining,
        )  # fmt: skip
        self._base = state.variables
        self._tuning = _trainable(TUNING, config.steps, self._mesh, seed, TUNED)
        self._step = make_train_step(self._tuning, 1, sft_loss)

        @jax.jit
        def next_token(variables: Any, tokens: jax.Array, length: jax.Array) -> jax.Array:
            """Return the most probable token `[B]` after the first `length` tokens of rows."""
            return jnp.argmax(base.model(variables).model(tokens)[:, length - 1], axis=-1)

        self._next_token = next_token

    def lookup_scores(self) -> dict[str, float]:
        """Score the pretrained decoder on looking up held-out names, and return its `scores`."""
        maps, rng = sampler(self.seed, None), np.random.default_rng([self.seed, 3])
        asked = [lookup(maps.held_out_map(i), rng) for i in range(self.config.prompts)]
        return self.scores(self._base, asked, False)

    def run(self, arm: Arm) -> dict[str, dict[str, dict[str, float]]]:
        """Tune a copy of the pretrained decoder on an arm's data, and score it at several steps.

        Args:
            arm: Options of the tuning data.

        Returns:
            Mapping from the step, written as text, to a mapping from the name of a test to the
            decoder's `scores`. The steps are `config.steps` and all smaller steps in `EARLY`.
        """
        state = self._tuning.start(jax.tree.map(lambda leaf: leaf.copy(), self._base))
        data, found, done = batches(arm, self.seed), {}, 0
        for steps in sorted({*EARLY, self.config.steps}):
            if steps <= self.config.steps:
                state = self._trained(self._step, state, data, steps - done)
                done = steps
                found[str(steps)] = {
                    name: self.scores(state.variables, test, arm.thoughts)
                    for name, test in self.tests.items()
                }
        return found

    def scores(
        self, variables: Any, examples: Sequence[Example], thoughts: bool
    ) -> dict[str, float]:
        """Score the answers that a decoder gives by greedy decoding.

        Args:
            variables: State of the decoder's parameters (`TrainState.variables`).
            examples: Examples whose prompts have equal numbers of tokens.
            thoughts: Whether the decoder writes a direction before its answer.

        Returns:
            `success`, the fraction of right answers, and `validity`, the fraction of answers that
            are a name in their prompt.
        """
        prompts = [[TOKENS[word] for word in example.prompt.text.split()] for example in examples]
        texts = np.array(prompts, np.int32)
        for _ in range(1 + thoughts):
            padded = np.pad(texts, ((0, 0), (0, WIDTH - texts.shape[1])))
            answer = self._next_token(variables, padded, texts.shape[1])
            texts = np.concatenate([texts, np.asarray(answer)[:, None]], axis=1)
        names = list(TOKENS)
        answers = [names[token] for token in texts[:, -1]]
        pairs = list(zip(answers, examples, strict=True))
        right = [answer == one.scored.names[one.direction] for answer, one in pairs]
        valid = [one.prompt.is_valid(answer) for answer, one in pairs]
        return {"success": float(np.mean(right)), "validity": float(np.mean(valid))}

    def _trained(
        self, step: TrainStep, state: TrainState, data: Iterator[Any], steps: int
    ) -> TrainState:
        for _ in range(steps):
            batch = {name: place(values, self._mesh) for name, values in next(data).items()}
            state, _ = step(state, batch)
        return state


def _trainable(
    optimizer: OptimizerConfig, steps: int, mesh: Any, seed: int, trained: Any
) -> Trainable:
    return make_trainable(
        MODEL, optimizer, steps, mesh, seed, "auto", trained, FinetunableModel.whole
    )


def main(config: FrozenPrompts) -> None:
    """Tune the arms that the file of results lacks, or print the tables."""
    run_study(config, KEY, train_missing, report)


def train_missing(config: FrozenPrompts, results: Results) -> Iterator[tuple[Result, str]]:
    """Train the runs that `results` lacks, and yield the result of each with a line to print.

    All arms of a seed start from the same pretrained decoder.
    """
    fixed = {name: getattr(config, name) for name in ("pretraining", "steps", "prompts")}
    runs = results.missing(
        {"arm": arm, **fixed, "seed": seed} for seed in config.seeds for arm in config.arms
    )
    for seed, of_seed in itertools.groupby(runs, key=lambda run: run["seed"]):
        study = Study(config, seed)
        known = study.lookup_scores()
        for run in of_seed:
            clock = Clock()
            scores = study.run(ARMS[run["arm"]])
            result = run | {"lookup": known, "scores": scores}
            result |= {"seconds": clock.read().seconds, "jax": jax.__version__}
            last = scores[str(config.steps)]
            shown = ", ".join(f"{name} {cell(score)}" for name, score in last.items())
            yield result, f"{run['arm']} seed {seed}: {shown}"


def cell(score: dict[str, float]) -> str:
    """Format the scores of a test as `success/validity`."""
    return f"{score['success']:.2f}/{score['validity']:.2f}"


def report(results: list[Result]) -> str:
    """Format two Markdown tables, of success and of validity: means over seeds ± standard errors.

    Scores after the steps of `EARLY` are shown for the arms "frozen" and "diverse" only. Runs that
    differ in `steps`, `pretraining` or `prompts` have separate rows.
    """
    heads = {"id": "ID", "permuted": "permuted", "pool": "trained pool", "held_out": "held-out",
             "far": "far, held-out", "fake": "Fake"}  # fmt: skip
    lines = []
    for measure in ("success", "validity"):
        table = []
        groups = by_key(results, "arm", "steps", "pretraining", "prompts")
        several = len({how[2:] for how in groups}) > 1
        for (arm, steps, pretraining, prompts), found in groups.items():
            note = f" ({pretraining} steps of pretraining, {prompts} prompts)" if several else ""
            for step in found[0]["scores"]:
                if step != str(steps) and arm not in ("frozen", "diverse"):
                    continue
                means = [
                    mean_text([run["scores"][step][test][measure] for run in found], 2)
                    for test in heads
                ]
                table.append((f"{arm}, step {step}{note}", *means, seeds_text(found)))
        lines += ["", *markdown_table((measure, *heads.values(), "seeds"), table)]
    return "\n".join(lines[1:])


def command() -> None:
    run_command(main, FrozenPrompts)


if __name__ == "__main__":
    command()
