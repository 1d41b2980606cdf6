"""Compare a weaver with LoRA, soft prompts and pause tokens as ways to teach a frozen reasoner.

python -m train.experiments.memory --out memory.jsonl
python -m train.experiments.memory --report memory.jsonl

A small decoder is pretrained on sums of two numbers and on copying lists of four digits. Only 2 %
of the texts sort a list, so that the decoder seldom sorts correctly. Then this reasoner is frozen,
and each arm learns to sort. The arms "long_soft_prompt" and "more_pause_tokens" have exactly as
many trainable parameters as the weaver, and "lora" has 12 % fewer. "soft_prompt" and "pause_tokens"
insert as many latents at a time as the weaver, but have fewer parameters. Test lists are sampled
independently of training lists and are not excluded from training: there are only 10,000 lists, and
with the default options each arm is trained on about 98 % of the test lists.

Each finished run (arm and seed) is one line of the file; a second call must have the same options,
and trains only the missing runs.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from memgen import (
    LoRAConfig,
    MemGen,
    MemGenConfig,
    Plan,
    WeaverConfig,
    WeaverParam,
    boundary_table,
    make_adapter,
    plan_insertions,
    token_log_probs,
)
from thoughtbubbles import Backbone, ModelConfig, Thoughtbubbles
from train.benchmarks.timing import Clock
from train.cli.command import run_command
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
from train.models.load import checksum

LETTERS = "\n0123456789+=,. sc"  # the vocabulary; the first letter is padding
WIDTH = 20
LENGTH = 4
RARE = 0.02
HELD_OUT = 2048  # number of test lists


def example(rng: np.random.Generator, kind: str) -> tuple[str, str]:
    """Sample the prompt and the answer of an example.

    Args:
        rng: Random generator of the numbers.
        kind: Kind of the example: "add" asks for the sum of two numbers below 50, "copy" and "sort"
            ask for a list of `LENGTH` digits.
    """
    if kind == "add":
        a, b = rng.integers(0, 50, 2)
        return f"{a}+{b}=", f"{a + b}."
    numbers = rng.integers(0, 10, LENGTH)
    shown = " ".join(map(str, numbers))
    if kind == "copy":
        return f"c{shown}=", ",".join(map(str, numbers)) + "."
    return f"s{shown}=", ",".join(map(str, np.sort(numbers))) + "."


def rows(rng: np.random.Generator, count: int, kinds: dict[str, float]) -> dict[str, np.ndarray]:
    """Sample rows of one example each.

    Args:
        rng: Random generator of the examples.
        count: Number of rows (B).
        kinds: Mapping from a kind of `example` to its probability.

    Returns:
        `tokens [B, WIDTH]` int32, padded with 0; and `loss_mask [B, WIDTH]` bool, True on answers.
    """
    tokens = np.zeros((count, WIDTH), np.int32)
    loss_mask = np.zeros((count, WIDTH), bool)
    for row, kind in enumerate(rng.choice(list(kinds), count, p=list(kinds.values()))):
        prompt, answer = example(rng, kind)
        ids = [LETTERS.index(letter) for letter in prompt + answer]
        tokens[row, : len(ids)] = ids
        loss_mask[row, len(prompt) : len(ids)] = True
    return {"tokens": tokens, "loss_mask": loss_mask}


PRETRAINING = {"add": 0.5, "copy": 0.5 - RARE, "sort": RARE}
REASONER = ModelConfig(vocab_size=32, embed_dim=64, num_layers=3, num_heads=4, mlp_dim=256)
BOUNDARY = boundary_table([*LETTERS, *[""] * (REASONER.vocab_size - len(LETTERS))])
WEAVER = WeaverConfig(prompt_latents=8, inference_latents=8, lora=LoRAConfig(8, 16.0))
ALL_LINEAR = ("q", "k", "v", "o", "up", "down")


class Arm(nnx.Module):
    """Base of all arms: a frozen reasoner with the parameters that the arm trains.

    Args:
        reasoner: Frozen decoder.
    """

    def __init__(self, reasoner: Backbone):
        self.reasoner = reasoner

    def predictors(self, batch: dict[str, jax.Array]) -> jax.Array:
        """Compute the hidden states `[B, L, D]` that predict each token of a batch.

        Args:
            batch: Arrays `tokens [B, L]` int32 and `loss_mask [B, L]` bool.
        """
        raise NotImplementedError


def decoder_predictors(decoder: Backbone, tokens: jax.Array) -> jax.Array:
    """Compute the hidden states `[B, L, D]` that predict each token of rows `[B, L]`.

    The hidden state that predicts the first token is 0, because no token precedes it.
    """
    hidden = decoder.hidden_states(decoder.embed_tokens(tokens))
    return jnp.pad(hidden, ((0, 0), (1, 0), (0, 0)))[:, :-1]


class Frozen(Arm):
    """Arm of the frozen reasoner alone, without trained parameters."""

    def predictors(self, batch):
        return decoder_predictors(self.reasoner, batch["tokens"])


class LoRA(Arm):
    """Arm with a LoRA adapter on all linear layers of the reasoner.

    Args:
        reasoner: Frozen decoder.
        rngs: PRNG keys for the adapter's initial parameters.
    """

    def __init__(self, reasoner: Backbone, rngs: nnx.Rngs):
        super().__init__(reasoner)
        config = LoRAConfig(4, 8.0, targets=ALL_LINEAR)
        self.adapter = make_adapter(reasoner, config, rngs=rngs, kind=WeaverParam)

    def predictors(self, batch):
        return decoder_predictors(self.reasoner.apply_lora(self.adapter), batch["tokens"])


class Memory(Arm):
    """Arm with latents that a weaver writes, or that are equal for all texts (`context="nothing"`).

    Args:
        reasoner: Frozen decoder.
        weaver: Config of the weaver.
        rngs: PRNG keys for the initial parameters.
        in_front: Whether latents are only inserted before the prompt, as a soft prompt. Otherwise
            latents are inserted before the answer and at the first boundary within the answer.
    """

    def __init__(
        self, reasoner: Backbone, weaver: WeaverConfig, rngs: nnx.Rngs, in_front: bool = False
    ):
        super().__init__(reasoner)
        events = 0 if in_front else 1
        config = MemGenConfig(weaver, max_inference_events=events)
        self.memgen = MemGen(reasoner, config, boundary=BOUNDARY, rngs=rngs)
        self.in_front = in_front

    def predictors(self, batch):
        tokens, memgen = batch["tokens"], self.memgen
        if self.in_front:
            first = jnp.zeros((tokens.shape[0], 1), jnp.int32)
            plan = Plan.of(first, first, memgen.config)
        else:
            plan = plan_insertions(tokens, batch["loss_mask"], memgen.boundary[...], memgen.config)
        return memgen.predictors(tokens, plan)


def _weaver(**changes) -> WeaverConfig:
    return dataclasses.replace(WEAVER, **changes)


ARMS: dict[str, Callable[[Backbone, nnx.Rngs], Arm]] = {
    "weaver": lambda reasoner, rngs: Memory(reasoner, WEAVER, rngs),
    "weaver_one_pass": lambda reasoner, rngs: Memory(
        reasoner, _weaver(latents_see_latents=False), rngs
    ),
    "lora": LoRA,
    "soft_prompt": lambda reasoner, rngs: Memory(
        reasoner, _weaver(context="nothing"), rngs, in_front=True
    ),
    "pause_tokens": lambda reasoner, rngs: Memory(reasoner, _weaver(context="nothing"), rngs),
    # These two arms have as many parameters as the weaver, whose LoRA adapter has the parameters of
    # 96 latents. (A soft prompt never uses the latents of later events, so that 641 of its
    # parameters do not change.)
    "long_soft_prompt": lambda reasoner, rngs: Memory(
        reasoner, _weaver(context="nothing", prompt_latents=104), rngs, in_front=True
    ),
    "more_pause_tokens": lambda reasoner, rngs: Memory(
        reasoner, _weaver(context="nothing", prompt_latents=56, inference_latents=56), rngs
    ),
}


@dataclasses.dataclass(frozen=True)
class Experiment(StudyConfig):
    """Trains each arm on a frozen reasoner, or reports stored results.

    Attributes:
        arms: Arms to train, all by default; "frozen" scores the reasoner alone.
        pretrain_steps: Number of training steps of the reasoner.
        steps: Number of training steps of each arm.
        batch_size: Number of rows in a step.
        learning_rate: Peak learning rate of the arms; the reasoner's peak learning rate is 0.003.
    """

    arms: tuple[str, ...] = ("frozen", *ARMS)
    pretrain_steps: int = 1500
    steps: int = 600
    batch_size: int = 64
    learning_rate: float = 1e-2
    out: str = "memory.jsonl"

    def __post_init__(self):
        super().__post_init__()
        check_names("arm", self.arms, ("frozen", *ARMS))


def main(config: Experiment) -> None:
    """Train the arms that the file of results lacks, or print the table."""
    settings = "pretrain_steps", "steps", "batch_size", "learning_rate"
    run_study(config, ("arm", "seed"), train_missing, report, settings)


def train_missing(config: Experiment, results: Results) -> Iterator[tuple[Result, str]]:
    """Train the runs that `results` lacks, and yield the result of each with a line to print.

    All arms of a seed use the same reasoner, which is pretrained first.
    """
    for seed in config.seeds:
        runs = results.missing({"arm": arm, "seed": seed} for arm in config.arms)
        if not runs:
            continue
        reasoner = pretrained(config, seed)
        for run in runs:
            result = run | score_arm(config, reasoner, run["arm"], seed)
            yield (
                result,
                (
                    f"{run['arm']} seed {seed}: {result['accuracy']:.3f} of {HELD_OUT}, loss "
                    f"{result['loss']:.4f}, {result['seconds']:.0f} s"
                ),
            )


def pretrained(config: Experiment, seed: int) -> Backbone:
    """Pretrain a reasoner on the mixture `PRETRAINING`, mainly sums and copies."""
    model = Thoughtbubbles(REASONER, rngs=nnx.Rngs(seed))
    arm = Frozen(Backbone(model))
    batches = data(np.random.default_rng([seed, 0]), config.batch_size, PRETRAINING)
    _, loss = fit(arm, nnx.Param, batches, config.pretrain_steps, 3e-3)
    print(f"reasoner seed {seed}: loss {loss:.4f}", flush=True)
    return arm.reasoner


def score_arm(config: Experiment, reasoner: Backbone, name: str, seed: int) -> Result:
    """Train one arm to sort, and score it on test lists.

    Args:
        config: Options of the experiment.
        reasoner: Frozen decoder.
        name: Name of the arm, a key of `ARMS`, or "frozen" to score the reasoner alone.
        seed: Seed of new parameters and of training lists.

    Returns:
        Entries of a result: the number of trained `parameters`; `accuracy`, the exact match as a
        fraction; `loss` in nats per answer token; the number of training `steps`; the checksum of
        the `reasoner`; `seconds`, the time with compilation and scoring; and the version of `jax`.

    Raises:
        RuntimeError: Training has changed the frozen reasoner.
    """
    clock = Clock()
    before = checksum(reasoner)
    arm = Frozen(reasoner)
    parameters = 0
    if name != "frozen":
        arm = ARMS[name](reasoner, nnx.Rngs(seed))
        batches = data(np.random.default_rng([seed, 1]), config.batch_size, {"sort": 1.0})
        parameters, _ = fit(arm, WeaverParam, batches, config.steps, config.learning_rate)
    after = checksum(reasoner)
    if before != after:
        raise RuntimeError(f"the frozen reasoner changed: {before} became {after}")
    held_out = rows(np.random.default_rng(12345), HELD_OUT, {"sort": 1.0})
    accuracy, loss = exact_match(arm, held_out)
    return {
        "parameters": parameters,
        "accuracy": accuracy,
        "loss": loss,
        "steps": 0 if name == "frozen" else config.steps,
        "reasoner": before,
        "seconds": clock.read().seconds,
        "jax": jax.__version__,
    }


def data(
    rng: np.random.Generator, batch_size: int, kinds: dict[str, float]
) -> Iterator[dict[str, np.ndarray]]:
    """Yield batches of `batch_size` sampled rows, as `rows` returns them, without end."""
    while True:
        yield rows(rng, batch_size, kinds)


def fit(
    arm: Arm, kind: type[nnx.Param], batches: Iterator, steps: int, learning_rate: float
) -> tuple[int, float]:
    """Train an arm's parameters of one class, and update the arm in place.

    The optimizer is Adam with gradients clipped to norm 1. The learning rate rises linearly during
    the first tenth of the steps and falls to 0 along a cosine.

    Args:
        arm: Arm to train.
        kind: Class of the parameters that are trained.
        batches: Batches as `rows` returns them.
        steps: Number of training steps.
        learning_rate: Peak learning rate.

    Returns:
        Number of trained parameters, and the loss of the last step in nats per answer token.
    """
    graphdef, params, rest = nnx.split(arm, kind, ...)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    @jax.jit
    def step(params, opt_state, batch):
        def loss(params):
            arm = nnx.merge(graphdef, params, rest)
            log_probs = answer_log_probs(arm, batch)
            return -log_probs.sum() / batch["loss_mask"].sum()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state, value = optimizer.init(params), jnp.inf
    for _ in range(steps):
        params, opt_state, value = step(params, opt_state, next(batches))
    nnx.update(arm, params)
    return sum(leaf.size for leaf in jax.tree.leaves(params)), float(value)


def answer_log_probs(arm: Arm, batch: dict[str, jax.Array]) -> jax.Array:
    """Compute the log-probability `[B, L]` of each answer token; 0 for other tokens."""
    hidden = arm.predictors(batch)
    return token_log_probs(arm.reasoner, hidden, batch["tokens"], batch["loss_mask"])


def exact_match(arm: Arm, held_out: dict[str, np.ndarray]) -> tuple[float, float]:
    """Compute the exact match of greedy decoding, as a fraction, and the nats per answer token.

    Greedy decoding matches an answer exactly if each answer token is the most probable token in a
    teacher-forced forward pass, so that no text needs to be generated.

    Args:
        arm: Arm to score.
        held_out: `HELD_OUT` test rows, as `rows` returns them.
    """

    @jax.jit
    def score(arm, batch):
        hidden = arm.predictors(batch)
        likeliest = arm.reasoner.unembed(hidden).argmax(axis=-1)
        right = (likeliest == batch["tokens"]) | ~batch["loss_mask"]
        return right.all(axis=1), answer_log_probs(arm, batch).sum()

    found, nats = [], 0.0
    for start in range(0, HELD_OUT, 256):
        part = {name: values[start : start + 256] for name, values in held_out.items()}
        right, log_prob = score(arm, part)
        found.append(np.asarray(right))
        nats -= float(log_prob)
    return float(np.concatenate(found).mean()), nats / float(held_out["loss_mask"].sum())


def report(results: list[Result]) -> str:
    """Format a Markdown table of each arm's test exact match: mean over seeds ± standard error."""
    rows = []
    for (arm,), of_arm in by_key(results, "arm").items():
        rows.append(
            (
                arm,
                f"{of_arm[0]['parameters']:,}",
                seeds_text(of_arm),
                mean_text([100 * result["accuracy"] for result in of_arm], 1),
                f"{np.mean([result['loss'] for result in of_arm]):.3f}",
                f"{np.mean([result['seconds'] for result in of_arm]):.0f}",
            )
        )
    head = ("arm", "trained", "seeds", "exact match %", "loss", "seconds")
    return "\n".join(markdown_table(head, rows))


def command() -> None:
    run_command(main, Experiment)


if __name__ == "__main__":
    command()
