"""Does woven memory teach a frozen reasoner? A weaver against controls of as many parameters.

python -m train.experiments.memory --out memory.jsonl
python -m train.experiments.memory --report memory.jsonl

A small decoder is pretrained on sums of two numbers and on copying lists; sorted lists are rare in
its texts, and it seldom sorts correctly. Then it is frozen, and each arm learns to sort.
Each finished (arm, seed) is a line of the file; a second call runs only what is missing.
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

LETTERS = "\n0123456789+=,. sc"  # the first one is padding
WIDTH = 20
LENGTH = 4
RARE = 0.02
HELD_OUT = 2048


def example(rng: np.random.Generator, kind: str) -> tuple[str, str]:
    """A prompt and its answer: `add`, `copy` or `sort`."""
    if kind == "add":
        a, b = rng.integers(0, 50, 2)
        return f"{a}+{b}=", f"{a + b}."
    numbers = rng.integers(0, 10, LENGTH)
    shown = " ".join(map(str, numbers))
    if kind == "copy":
        return f"c{shown}=", ",".join(map(str, numbers)) + "."
    return f"s{shown}=", ",".join(map(str, np.sort(numbers))) + "."


def rows(rng: np.random.Generator, count: int, kinds: dict[str, float]) -> dict[str, np.ndarray]:
    """Random examples: `tokens [B, L]` int32, and `loss_mask [B, L]` bool, True on answers.

    Args:
        rng: Generator of the examples.
        count: Number of rows, B.
        kinds: Probability of each kind.
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
    """A frozen reasoner with the parameters that an arm trains."""

    def __init__(self, reasoner: Backbone):
        self.reasoner = reasoner

    def predictors(self, batch: dict[str, jax.Array]) -> jax.Array:
        """Hidden states `[B, L, D]` that predict each token."""
        raise NotImplementedError


def decoder_predictors(decoder: Backbone, tokens: jax.Array) -> jax.Array:
    """Hidden states `[B, L, D]` that predict each token; zeros for the first."""
    hidden = decoder.hidden_states(decoder.embed_tokens(tokens))
    return jnp.pad(hidden, ((0, 0), (1, 0), (0, 0)))[:, :-1]


class Frozen(Arm):
    """The reasoner alone."""

    def predictors(self, batch):
        return decoder_predictors(self.reasoner, batch["tokens"])


class LoRA(Arm):
    """An adapter on the reasoner itself."""

    def __init__(self, reasoner: Backbone, rngs: nnx.Rngs):
        super().__init__(reasoner)
        config = LoRAConfig(4, 8.0, targets=ALL_LINEAR)
        self.adapter = make_adapter(reasoner, config, rngs=rngs, kind=WeaverParam)

    def predictors(self, batch):
        return decoder_predictors(self.reasoner.apply_lora(self.adapter), batch["tokens"])


class Memory(Arm):
    """A weaver, or latents without a context (`context="nothing"`).

    Args:
        reasoner: Frozen decoder.
        weaver: Config of the weaver.
        rngs: Random state of new parameters.
        in_front: Whether latents stand in front of the text alone, as a soft prompt does.
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
    # As many trained parameters as the weaver, whose LoRA has as many as 96 latents. (A soft prompt
    # never uses the bank for later events: 641 of its parameters stay as they are.)
    "long_soft_prompt": lambda reasoner, rngs: Memory(
        reasoner, _weaver(context="nothing", prompt_latents=104), rngs, in_front=True
    ),
    "more_pause_tokens": lambda reasoner, rngs: Memory(
        reasoner, _weaver(context="nothing", prompt_latents=56, inference_latents=56), rngs
    ),
}


@dataclasses.dataclass(frozen=True)
class Experiment(StudyConfig):
    """Trains arms on a frozen reasoner, or reports what was trained.

    Attributes:
        arms: Names of `ARMS`; "frozen" is the reasoner alone.
        pretrain_steps: Number of steps that train the reasoner.
        steps: Number of steps that train each arm.
        batch_size: Number of rows of a step.
        learning_rate: Peak learning rate of the arms.
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
    """Train what is missing, or print the table."""
    run_study(config, ("arm", "seed"), train_missing, report)


def train_missing(config: Experiment, results: Results) -> Iterator[tuple[Result, str]]:
    """Train the runs that `results` lacks, and yield the result of each with a line to print.

    The arms of a seed share its reasoner.
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
    """A reasoner that has learned to add and to copy."""
    model = Thoughtbubbles(REASONER, rngs=nnx.Rngs(seed))
    arm = Frozen(Backbone(model))
    batches = data(np.random.default_rng([seed, 0]), config.batch_size, PRETRAINING)
    _, loss = fit(arm, nnx.Param, batches, config.pretrain_steps, 3e-3)
    print(f"reasoner seed {seed}: loss {loss:.4f}", flush=True)
    return arm.reasoner


def score_arm(config: Experiment, reasoner: Backbone, name: str, seed: int) -> Result:
    """Train one arm to sort.

    Returns:
        Exact match on held-out lists, and the cost of the arm.

    Raises:
        RuntimeError: The frozen reasoner changed.
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
    """Batches without end."""
    while True:
        yield rows(rng, batch_size, kinds)


def fit(
    arm: Arm, kind: type[nnx.Param], batches: Iterator, steps: int, learning_rate: float
) -> tuple[int, float]:
    """Train the arm's parameters of one kind; the arm is updated.

    Returns:
        The number of these parameters, and the loss of the last step.
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
    """Log-probability of each answer token, `[B, L]`, 0 elsewhere."""
    hidden = arm.predictors(batch)
    return token_log_probs(arm.reasoner, hidden, batch["tokens"], batch["loss_mask"])


def exact_match(arm: Arm, held_out: dict[str, np.ndarray]) -> tuple[float, float]:
    """Share of answers that greedy decoding would write, and nats per answer token.

    Greedy decoding writes the answer exactly if each of its tokens is the likeliest after the ones
    before it, so no text need be generated.
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
    """A markdown table: held-out exact match in percent, mean over seeds ± its standard error."""
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
