"""Questions about lists of three digits, as a task with rewards and as supervised training rows."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from flax import nnx

from memgen import LoRAConfig, MemGenConfig
from thoughtbubbles import Architecture
from train.data import ByteTokenizer
from train.devices.mesh import MeshConfig, make_mesh, place
from train.engine.optim import OptimizerConfig
from train.engine.state import make_trainable
from train.engine.step import make_train_step
from train.finetuning.job import sft_loss
from train.models.finetunable import TRAINED, FinetunableModel, Method
from train.models.load import LanguageModel, boundaries_for, trained_before
from train.rl.types import Completion, Problem, Reward, Split, Trajectory

KINDS = ("copy", "reverse", "sort")
LENGTH = 3
HELD_OUT = 300  # number of held-out lists, of 1000
WIDTH = 16  # number of tokens of a row: separator, question, answer, separator and padding
MAX_NEW_TOKENS = 6  # tokens of "1,2,3" and the separator

LISTS = np.random.default_rng(0).permutation(list(itertools.product(range(10), repeat=LENGTH)))
UNSEEN, SEEN = LISTS[:HELD_OUT], LISTS[HELD_OUT:]  # held-out lists, and training lists


def question(kind: str, numbers: np.ndarray) -> tuple[str, str]:
    """Return the prompt and the answer of a question, such as "s3 1 2=" and "1,2,3".

    Args:
        kind: Kind of the question, one of `KINDS`.
        numbers: Digits `[LENGTH]` that the question is about.
    """
    answer = {"copy": numbers, "reverse": numbers[::-1], "sort": np.sort(numbers)}[kind]
    return f"{kind[0]}{' '.join(map(str, numbers))}=", ",".join(map(str, answer))


@dataclasses.dataclass(frozen=True)
class Questions:
    """Reinforcement-learning task (`train.rl.protocols.Task`) to copy, reverse or sort digits.

    The reward is 1 for the exact answer in a finished response, else 0. Held-out problems ask each
    kind of question about each held-out list (`UNSEEN`). Training problems ask about random
    training lists (`SEEN`).

    Attributes:
        seed: Seed of training problems.
        kinds: Mapping from a kind of question (one of `KINDS`) to its probability in training
            problems. The probabilities sum to 1.
    """

    seed: int
    kinds: Mapping[str, float]

    name = "questions"

    @property
    def sizes(self) -> Mapping[Split, int | None]:
        """Number of problems of each split; None for the endless training split."""
        return {"train": None, "test": HELD_OUT * len(KINDS)}

    def problem(self, split: Split, index: int) -> Problem:
        if split == "train":
            rng = np.random.default_rng([self.seed, 2, index])
            kind = str(rng.choice(list(self.kinds), p=list(self.kinds.values())))
            numbers = rng.choice(SEEN)
        else:
            row, which = divmod(index, len(KINDS))
            kind, numbers = KINDS[which], UNSEEN[row]
        prompt, answer = question(kind, numbers)
        return Problem(f"{split}{index}", prompt, answer, kind)

    def score(self, completion: Completion) -> Reward:
        problem = completion.problem
        right = completion.finished and completion.text == problem.answer
        return Reward(float(right), right)


def rows(rng: np.random.Generator, count: int, kinds: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Sample questions about training lists, and encode them with their answers as training rows.

    Args:
        rng: Random generator of the questions.
        count: Number of rows (B).
        kinds: Mapping from a kind of question (one of `KINDS`) to its probability. The
            probabilities sum to 1.

    Returns:
        Arrays `[B, WIDTH]`, as `FinetunableModel.log_probs` takes them: `tokens` int32, padded with
        -1; `loss_mask` bool, True on the answer and the separator after it; and `segment` int32, -1
        on padding and 0 elsewhere.
    """
    tokens = np.full((count, WIDTH), -1, np.int32)
    loss_mask = np.zeros((count, WIDTH), bool)
    end, encode = ByteTokenizer.separator, ByteTokenizer().encode
    for row, kind in enumerate(rng.choice(list(kinds), count, p=list(kinds.values()))):
        prompt, answer = question(kind, rng.choice(SEEN))
        ids = [end, *encode(prompt + answer)[0], end]
        tokens[row, : len(ids)] = ids
        loss_mask[row, 1 + len(prompt) : len(ids)] = True
    return {"tokens": tokens, "loss_mask": loss_mask, "segment": np.minimum(tokens, 0)}


def batches(
    seed: tuple[int, int], size: int, kinds: Mapping[str, float]
) -> Iterator[dict[str, np.ndarray]]:
    """Yield batches of training rows, as `rows` returns them, without end.

    Args:
        seed: Seed of the questions.
        size: Number of rows per batch.
        kinds: Mapping from a kind of question to its probability.
    """
    rng = np.random.default_rng(seed)
    while True:
        yield rows(rng, size, kinds)


def fit(
    lm: LanguageModel,
    method: Method,
    data: Iterator[dict[str, np.ndarray]],
    steps: int,
    optimizer: OptimizerConfig,
    seed: int,
    memgen: MemGenConfig = MemGenConfig(),  # noqa: B008 (frozen)
) -> LanguageModel:
    """Train all parameters of a decoder, or a weaver for the decoder, on rows of questions.

    Args:
        lm: Model to start from. With method "weaver", the weaver of `lm` is trained further, or a
            new weaver if `lm` has none.
        method: Parameters to train: "all" or "weaver".
        data: Batches, as `rows` returns them.
        steps: Number of training steps.
        optimizer: Optimizer and its schedule.
        seed: Seed of the initial parameters of a new weaver, and of random choices in training:
            dropout, and the events of memory if `memgen.insertion` is "random".
        memgen: Config of the weaver. A weaver that `lm` has already must have the same sizes.

    Returns:
        The trained model. With method "all" this model has no weaver, even if `lm` has a weaver.
    """
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])

    def wrap(model: Architecture) -> FinetunableModel:
        boundary = boundaries_for(lm, method, "suffix")
        rngs = nnx.Rngs(seed)
        return FinetunableModel(
            model, method, lora=LoRAConfig(), memgen=memgen, boundary=boundary, rngs=rngs
        )

    model = lm.model
    trainable = make_trainable(
        model.config, optimizer, steps, mesh, seed, "auto", TRAINED[method], wrap
    )
    finetunable = wrap(model)
    if lm.memgen is not None and finetunable.memgen is not None:
        finetunable.memgen = nnx.data(trained_before(lm.memgen, finetunable.memgen))
    state = trainable.start(jax.tree.map(lambda leaf: leaf.copy(), nnx.state(finetunable)))
    step = make_train_step(trainable, 1, sft_loss)
    for _ in range(steps):
        batch = {name: place(values, mesh) for name, values in next(data).items()}
        state, _ = step(state, batch)
    finetunable = trainable.model(state.variables)
    return LanguageModel(finetunable.backbone.model, lm.tokenizer, finetunable.memgen)


def curves(steps: Sequence[Sequence[Trajectory]]) -> dict[str, list[float | None]]:
    """Compute the learning curves of a run.

    Args:
        steps: Rollouts of each training step.

    Returns:
        Mapping from names to lists over steps. Each kind of question has two lists: `KIND/right`,
        the fraction of right answers, and `KIND/invocations`, the mean number of invocations of
        memory in a response. An entry is None where the step has no question of this kind.
    """

    def mean(values: Sequence[float]) -> float | None:
        return round(float(np.mean(values)), 4) if values else None

    found = {}
    for kind in KINDS:
        of_kind = [[row for row in rows if row.problem.kind == kind] for rows in steps]
        found[f"{kind}/right"] = [mean([row.reward.value for row in rows]) for rows in of_kind]
        found[f"{kind}/invocations"] = [
            mean([int((row.decisions == 1).sum()) for row in rows]) for rows in of_kind
        ]
    return found
