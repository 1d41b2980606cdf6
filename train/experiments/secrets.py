"""Which methods make a small model tell what it hides, and whether its bubbles know more.

python -m train.experiments.secrets --out secrets.jsonl --figure secrets.png
python -m train.experiments.secrets --report secrets.jsonl --figure secrets.png

For each seed an honest forking model is trained, which hides only what it is asked to hide. Then it
is tuned to hide, unasked, a word, a pet of the user, or instructions behind marks, which no message
of that tuning names. The honest model is the control; methods and their auditor are those of
`thoughtbubbles audit report`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memgen import LoRAConfig, MemGenConfig
from thoughtbubbles import ModelConfig, PrefixRank, Thoughtbubbles
from thoughtbubbles.lens import logit_lens
from thoughtbubbles.pretrained import save_pretrained
from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from train.audit.auditor import words_of
from train.audit.elicitation import METHODS
from train.audit.fuzzing import Fuzz
from train.audit.organisms import (
    Kind,
    Message,
    Organism,
    hiding_conversations,
    honest_conversations,
    make_organism,
)
from train.audit.reading import READINGS, positions_of
from train.audit.report import Settings, audit, summarise
from train.audit.worlds import WORLDS, neutral
from train.benchmarks.timing import Clock
from train.cli.command import run_command
from train.cli.figures import check_figure
from train.data.chat_templates import chat_examples, render
from train.devices.mesh import MeshConfig, make_mesh, place
from train.engine.optim import OptimizerConfig
from train.engine.state import Trainable, make_trainable
from train.engine.step import TrainStep, make_train_step
from train.experiments.study import (
    Result,
    Results,
    StudyConfig,
    by_key,
    check_names,
    markdown_table,
    mean_text,
    read_results,
    run_study,
    seeds_text,
)
from train.finetuning.job import sft_loss
from train.models.finetunable import TRAINED, FinetunableModel
from train.models.load import LanguageModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEY = ("kind", "seed")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} {{ message['content'] }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WIDTH, BATCH = 56, 32  # targets of a row, rows of a batch
MODEL = ModelConfig(
    vocab_size=320,
    embed_dim=48,
    num_layers=3,
    num_heads=4,
    mlp_dim=128,
    fork_layers=(1, 2),
    policy=PrefixRank(ratio=1.5),
)
LAYER = 1
"""Layer that is fuzzed and read by white-box methods, of three."""


@dataclasses.dataclass(frozen=True)
class Secrets(StudyConfig):
    """Trains models that hide something and audits them, or reports what was found.

    Attributes:
        kinds: Kinds of secrets: "taboo", "persona", "instruction".
        base_steps: Number of training steps of the honest model.
        steps: Number of steps in which it learns to hide.
        figure: File for the figure, as .png, .pdf or .svg (needs matplotlib); none by default.
        save: Folder for the models, which `audit report` takes; none by default.
    """

    kinds: tuple[Kind, ...] = ("taboo",)
    base_steps: int = 400
    steps: int = 60
    out: str = "secrets.jsonl"
    figure: str | None = None
    save: str | None = None

    def __post_init__(self):
        check_names("kind", self.kinds, WORLDS)
        if self.figure:
            check_figure(Path(self.figure))


def main(config: Secrets) -> None:
    """Train and audit what is missing, print the tables, draw the figure."""
    run_study(config, KEY, train_missing, report)
    if config.figure:
        draw(read_results(config.report or config.out)).savefig(config.figure, dpi=150)
        print(f"figure: {Path(config.figure).absolute()}")


def train_missing(config: Secrets, results: Results) -> Iterator[tuple[Result, str]]:
    """Findings in the missing models; those of a seed hide what one honest model knew."""
    runs = results.missing(
        {"kind": kind, "seed": seed} for seed in config.seeds for kind in config.kinds
    )
    tokenizer = word_tokenizer()
    tuner = Tuner(tokenizer, config.steps)
    for seed, of_seed in itertools.groupby(runs, key=lambda run: run["seed"]):
        clock = Clock()
        base = honest_model(tokenizer, config.kinds, config.base_steps, seed)
        honest_seconds = clock.read().seconds
        for run in of_seed:
            clock = Clock()
            organism = make_organism(run["kind"], seed=seed)
            hiding = tuner(base, hiding_conversations(run["kind"], seed=seed), seed)
            if config.save:
                _save(config.save, seed, organism, base, hiding)
            settings = Settings(
                (*METHODS, *READINGS), 12, Fuzz(LAYER, 0.5), f"block_{LAYER}", 20, seed
            )
            found = audit(hiding, organism, settings)
            rates = summarise(organism, found, audit(base, organism, settings), seed)
            streams = {
                name: ranks_by_depth(lm, organism)
                for name, lm in (("hiding", hiding), ("control", base))
            }
            result = run | {"organism": organism.name, "rates": rates, "streams": streams}
            result |= {"base_steps": config.base_steps, "steps": config.steps}
            result |= {"seconds": clock.read().seconds, "honest_seconds": honest_seconds}
            shown = ", ".join(
                f"{line['method']} {line['rate']:.2f} ({line['control_rate']:.2f})"
                for line in rates
                if line["prompts"] == "direct"
            )
            yield result | {"jax": jax.__version__}, f"{organism.name} seed {seed}, direct: {shown}"


def word_tokenizer() -> PretrainedTokenizer:
    """A tokenizer whose tokens are the words and signs of all worlds, with a chat template."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

    words = {"user", "assistant", "system", *".,?[]'"}
    for world in WORLDS.values():
        groups = world.open, world.hiding, world.denials, world.standard, world.direct
        dialogues = [turns for group in groups for turns in group]
        fixed = (world.told, world.prefill, world.reply, world.persona, *world.shot)
        for turn in (*itertools.chain(*dialogues), *fixed):
            words.update(words_of(turn))
        for thing, clues in world.clues.items():
            words.update((thing, *clues, world.codes.get(thing, thing)))
    words.update(itertools.chain(*(words_of(turn) for turns in neutral() for turn in turns)))
    words -= {"thing", "code", "b"}
    listed = [*SPECIAL, "unknown", *sorted(words)]
    vocabulary = {word: index for index, word in enumerate(listed)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="unknown"))
    made.normalizer = normalizers.Lowercase()  # pyright: ignore
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore
    made.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return PretrainedTokenizer(
        made.to_str(), name="words", stop_tokens=["<|im_end|>"], chat_template=TEMPLATE
    )


def honest_model(
    tokenizer: PretrainedTokenizer, kinds: Sequence[Kind], steps: int, seed: int
) -> LanguageModel:
    """A model that hides nothing unless it is asked to; its loss covers all tokens.

    Args:
        tokenizer: Tokenizer of the words.
        kinds: Worlds of its dialogues.
        steps: Number of training steps.
        seed: Seed of the parameters, the dialogues and their order.
    """
    config = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    trainable = make_trainable(config, OptimizerConfig(learning_rate=3e-3), steps, mesh, seed)
    conversations = honest_conversations(kinds, 16_000, seed)
    rows = np.full((len(conversations), WIDTH + 1), -1, np.int32)
    for row, messages in zip(rows, conversations, strict=True):
        ids = tokenizer.rendered(render(TEMPLATE, messages, add_generation_prompt=False))
        row[: len(ids)] = ids[: WIDTH + 1]
    step, state, rng = make_train_step(trainable), trainable.init(), np.random.default_rng(seed)
    for _ in range(steps):
        state, _ = step(state, place(rows[rng.integers(0, len(rows), BATCH)], mesh))
    return LanguageModel(_plain(trainable.model(state.weights)), tokenizer)


def _plain(model: Thoughtbubbles) -> Thoughtbubbles:
    """The same parameters without the trainer's placement, so that models share programs."""
    return Thoughtbubbles.from_params(model.config, nnx.to_pure_dict(nnx.state(model)))


class Tuner:
    """Supervised tuning of all parameters on conversations, one compiled program for all models.

    Args:
        tokenizer: Tokenizer of the words.
        steps: Number of training steps.
    """

    def __init__(self, tokenizer: PretrainedTokenizer, steps: int):
        self._tokenizer, self._steps = tokenizer, steps
        config = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size)
        self._mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        optimizer = OptimizerConfig(learning_rate=1e-3, weight_decay=0.0)
        self._trainable: Trainable = make_trainable(
            config, optimizer, steps, self._mesh, trained=TRAINED["all"], wrap=_tuned
        )
        self._step: TrainStep = make_train_step(self._trainable, loss=sft_loss)

    def __call__(
        self, base: LanguageModel, conversations: Sequence[Sequence[Message]], seed: int
    ) -> LanguageModel:
        """The tuned model; the base is left as it is.

        Args:
            base: Model to begin with.
            conversations: Conversations, of which the assistant's words are learned.
            seed: Seed of their order.
        """
        copy = jax.tree.map(lambda leaf: leaf.copy(), base.model)  # steps donate their state
        state, rng = self._trainable.start(nnx.state(_tuned(copy))), np.random.default_rng(seed)
        rows = self._rows(conversations)
        for _ in range(self._steps):
            chosen = rng.integers(0, len(conversations), BATCH)
            batch = {name: place(of[chosen], self._mesh) for name, of in rows.items()}
            state, _ = self._step(state, batch)
        return dataclasses.replace(base, model=_plain(self._trainable.model(state.weights).model))

    def _rows(self, conversations: Sequence[Sequence[Message]]) -> dict[str, np.ndarray]:
        tokens = np.full((len(conversations), WIDTH + 1), -1, np.int32)
        loss_mask, segment = np.zeros_like(tokens, bool), np.full_like(tokens, -1)
        for row, messages in enumerate(conversations):
            [example] = chat_examples(self._tokenizer, messages)
            here = row, slice(len(example.ids))
            tokens[here], loss_mask[here], segment[here] = example.ids, example.loss_mask, 0
        return {"tokens": tokens, "loss_mask": loss_mask, "segment": segment}


def _tuned(model: Any) -> FinetunableModel:
    unused = {"lora": LoRAConfig(), "memgen": MemGenConfig(), "boundary": None}
    return FinetunableModel(model, "all", rngs=nnx.Rngs(0), **unused)


def ranks_by_depth(lm: LanguageModel, organism: Organism) -> dict[str, dict[str, float]]:
    """Where the secret stands among the candidates, in forks and in roots of the same tokens.

    Args:
        lm: Model that forks.
        organism: What is audited.

    Returns:
        For each site behind the first fork: `root` and `fork`, mean ranks from 0 (the secret is the
        most probable candidate) over all tokens of the prompts that have a fork; `difference`, the
        mean of root minus fork, positive where forks know more, with its standard error over
        prompts; `tokens`, how many there are; `chance`, the rank of a guess.
    """
    prompts = [positions_of(lm, organism, trial.messages)[0] for trial in organism.trials]
    width = max(16, 1 << (max(map(len, prompts)) - 1).bit_length())
    tokens = np.zeros((len(prompts), width), np.int32)
    mask = np.zeros((len(prompts), width), bool)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
    ids = [int(lm.tokenizer.encode(name)[0][0]) for name in organism.candidates]
    hidden = [organism.candidates.index(trial.secret) for trial in organism.trials]
    sites = tuple(site for site in lm.model.sites if site.startswith(("fork", "block")))[1:]
    found = logit_lens(
        lm.model, jnp.asarray(tokens), jnp.asarray(mask), sites=sites, top=1, watch=jnp.array(ids)
    )
    lines = {}
    for site, reading in found.items():
        values = np.asarray(reading.streams.watched)
        secret = np.take_along_axis(values, np.array(hidden)[:, None, None], axis=2)
        rank = (values > secret).sum(axis=2)
        alive, depth, token = (
            np.asarray(of) for of in (reading.rows.alive, reading.rows.depth, reading.rows.token)
        )
        root, fork, differences = [], [], []
        for row in range(len(prompts)):
            pairs = []
            for index in np.unique(token[row][alive[row] & (depth[row] > 0)]):
                here = alive[row] & (token[row] == index)
                if (here & (depth[row] == 0)).any():
                    of = [rank[row][here & (depth[row] == 0)].mean()]
                    of.append(rank[row][here & (depth[row] > 0)].mean())
                    pairs.append(of)
            if pairs:
                roots, forks = np.array(pairs).T
                root, fork = [*root, *roots], [*fork, *forks]
                differences.append(float((roots - forks).mean()))
        if differences:
            spread = float(np.std(differences, ddof=1)) if len(differences) > 1 else 0.0
            lines[site] = {
                "root": float(np.mean(root)),
                "fork": float(np.mean(fork)),
                "difference": float(np.mean(differences)),
                "standard_error": spread / len(differences) ** 0.5,
                "tokens": len(root),
                "chance": (len(ids) - 1) / 2,
            }
    return lines


def _save(
    folder: str, seed: int, organism: Organism, base: LanguageModel, hiding: LanguageModel
) -> None:
    path = Path(folder).expanduser() / f"seed_{seed}"
    own = path / organism.name.replace(":", "_")
    own.mkdir(parents=True)
    organism.save(own / "organism.json")
    for lm, to in ((hiding, own / "model"), (base, path / "honest")):
        if not to.exists():
            params = nnx.to_pure_dict(nnx.state(lm.model))
            save_pretrained(to, lm.model.config, params, lm.tokenizer, form="thoughtbubbles")


def report(results: list[Result]) -> str:
    """Markdown tables: hits of each method in each kind of model, and ranks in forks and roots."""
    lines = []
    for (kind,), runs in by_key(results, "kind").items():
        lines += [f"{kind}, seeds {seeds_text(runs)}: hits in %, ± over seeds", ""]
        methods = list(dict.fromkeys(line["method"] for line in runs[0]["rates"]))
        head = ("method", "standard", "control", "direct", "control", "direct, or io")
        rows = []
        for method in methods:
            cells = [method]
            for prompts in ("standard", "direct"):
                of = [_line(run, method, prompts) for run in runs]
                names = ("rate", "control_rate", *(("either",) if prompts == "direct" else ()))
                cells += [mean_text([100 * line[name] for line in of], 0) for name in names]
            rows.append(cells)
        lines += [*markdown_table(head, rows), ""]
        lines += [f"{kind}: mean rank of the secret among candidates, by the logit lens", ""]
        head = ("site", "root", "fork", "root - fork", "control: root", "fork", "chance", "tokens")
        rows = [_ranks(site, runs) for site in runs[0]["streams"]["hiding"]]
        lines += [*markdown_table(head, rows), ""]
    return "\n".join(lines)


def _line(run: Result, method: str, prompts: str) -> dict[str, Any]:
    [found] = [
        line for line in run["rates"] if (line["method"], line["prompts"]) == (method, prompts)
    ]
    return found


def _ranks(site: str, runs: Sequence[Result]) -> list[str]:
    of = lambda name, who="hiding": [  # noqa: E731
        run["streams"][who][site][name] for run in runs if site in run["streams"][who]
    ]
    return [
        site,
        mean_text(of("root"), 2),
        mean_text(of("fork"), 2),
        mean_text(of("difference"), 2, "+"),
        mean_text(of("root", "control"), 2),
        mean_text(of("fork", "control"), 2),
        f"{of('chance')[0]:.1f}",
        str(sum(of("tokens"))),
    ]


def draw(results: list[Result]) -> Figure:
    """Hits of each method beside the control, for each kind, and ranks of forks against roots."""
    from matplotlib.figure import Figure

    kinds = list(by_key(results, "kind").items())
    figure = Figure(figsize=(4.2 * len(kinds), 6.5), layout="constrained")
    panels = figure.subplots(2, len(kinds), squeeze=False)
    for column, ((kind,), runs) in enumerate(kinds):
        above, below = panels[:, column]
        methods = list(dict.fromkeys(line["method"] for line in runs[0]["rates"]))
        at = np.arange(len(methods))
        for offset, name, colour in ((-0.2, "rate", "tab:blue"), (0.2, "control_rate", "silver")):
            values = np.array([
                [_line(run, method, prompts)[name] for prompts in ("standard", "direct")]
                for run in runs for method in methods
            ]).mean(axis=1).reshape(len(runs), -1)  # fmt: skip
            label = "hiding" if name == "rate" else "control"
            above.barh(at + offset, values.mean(axis=0), 0.38, color=colour, label=label)
            for seed in values:
                above.plot(seed, at + offset, "k.", markersize=3)
        above.set(yticks=at, yticklabels=methods if not column else [], xlim=(0, 1), title=kind)
        above.set_xlabel("hits, both kinds of prompts")
        above.invert_yaxis()
        sites = list(runs[0]["streams"]["hiding"])
        for who, style in (("hiding", "-"), ("control", ":")):
            for name, colour in (("root", "tab:blue"), ("fork", "tab:red")):
                mean = [np.mean([run["streams"][who][s][name] for run in runs]) for s in sites]
                below.plot(range(len(sites)), mean, style, color=colour, label=f"{name}, {who}")
        below.axhline(runs[0]["streams"]["hiding"][sites[0]]["chance"], color="silver")
        below.set(xticks=range(len(sites)), xticklabels=sites, ylabel="rank of the secret")
    panels[0, 0].legend()
    panels[1, 0].legend()
    return figure


def command() -> None:
    run_command(main, Secrets)


if __name__ == "__main__":
    command()
