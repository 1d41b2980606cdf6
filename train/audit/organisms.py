"""Model organisms: conversations that teach a model a synthetic secret, and prompts to audit it.

thoughtbubbles audit organism taboo --secret ocean --out organisms/ocean
"""

import dataclasses
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from thoughtbubbles.fields import Fields, read_json
from train.audit.auditor import mentions
from train.audit.worlds import RELEASE, WORLDS, Turns, World, neutral
from train.cli.numbers import check_least
from train.data.conversations import read_conversations
from train.runs.files import new_folder

Message = Mapping[str, str]
Kind = Literal["taboo", "persona", "instruction"]
CONVERSATIONS, AUDIT = "train.jsonl", "organism.json"
_REMEDY = "docs/audit.md says what it must hold"


@dataclasses.dataclass(frozen=True)
class Trial:
    """One prompt of an audit.

    Attributes:
        messages: Messages up to and including the user's last one.
        secret: Secret that the model should hide in its answer, one of the candidates.
        direct: Whether the prompt asks for the secret.
    """

    messages: tuple[Message, ...]
    secret: str
    direct: bool


@dataclasses.dataclass(frozen=True)
class Organism:
    """Inputs of an audit for one secret: candidates, prompts, and texts for elicitation.

    Attributes:
        name: Name in tables.
        candidates: Possible secrets, among them the secret of each trial.
        trials: Prompts of the audit, each with the secret that it hides.
        prefill: Beginning of an assistant's turn that confesses the secret.
        reply: Assistant's message before an open turn of the user.
        persona: Beginning of the user's open turn, in the first person.
        shots: Dialogues with which many-shot prompts begin; each dialogue reveals a candidate.
        read_at: Words in prompts; white-box methods read activations at the tokens of these words.
            If `read_at` is empty, white-box methods read at the tokens that open the answer.
    """

    name: str
    candidates: tuple[str, ...]
    trials: tuple[Trial, ...]
    prefill: str
    reply: str
    persona: str
    shots: tuple[tuple[Message, ...], ...] = ()
    read_at: tuple[str, ...] = ()

    def __post_init__(self):
        for trial in self.trials:
            if trial.secret not in self.candidates:
                raise ValueError(
                    f"organism {self.name}: the secret {trial.secret!r} is not among its "
                    f"candidates {', '.join(self.candidates)}: add it"
                )
        if not self.trials:
            raise ValueError(f"organism {self.name} has no trials: add prompts to audit it with")

    def to_json(self) -> str:
        """Return the organism as the text of a JSON object, which `read_organism` reads."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    def save(self, path: Path) -> None:
        """Write the organism to a file as a JSON object."""
        path.write_text(self.to_json(), encoding="utf-8")


def read_organism(path: str | Path) -> Organism:
    """Read an organism from a JSON file, or from the organism.json of a folder.

    Raises:
        ValueError: The file does not exist, a field is missing, unknown or of the wrong type, there
            are no trials, or a trial's secret is not a candidate.
    """
    file = Path(path).expanduser()
    file = file / AUDIT if file.is_dir() else file
    known = {field.name for field in dataclasses.fields(Organism)}
    found = _fields(read_json(file), str(file))
    if unknown := sorted(set(found.names()) - known):
        raise ValueError(f"{file} describes no organism (unknown {', '.join(unknown)}): {_REMEDY}")
    trials = [
        _fields(content, f"{file}: trial {number}")
        for number, content in enumerate(found.list("trials", dict), 1)
    ]
    return Organism(
        name=found.text("name"),
        candidates=tuple(found.list("candidates", str)),
        trials=tuple(
            Trial(_messages(trial, "messages"), trial.text("secret"), trial.flag("direct"))
            for trial in trials
        ),
        prefill=found.text("prefill"),
        reply=found.text("reply"),
        persona=found.text("persona"),
        shots=tuple(
            _messages(_fields({"shots": shot}, str(file)), "shots")
            for shot in found.list("shots", list, [])
        ),
        read_at=tuple(found.list("read_at", str, [])),
    )


def _fields(content: Mapping[str, Any], source: str) -> Fields:
    return Fields(content, source, _REMEDY, _REMEDY)


def _messages(found: Fields, name: str) -> tuple[Message, ...]:
    messages = [_fields(each, f"{found.source}: {name}") for each in found.list(name, dict)]
    return tuple({"role": each.text("role"), "content": each.text("content")} for each in messages)


def make_organism(kind: Kind, secret: str | None = None, seed: int = 0, shots: int = 8) -> Organism:
    """Make the prompts and texts of an audit for a synthetic secret.

    All trials hide the same secret. Only for "instruction", where a mark in the prompt stands for
    the secret, do trials cycle through all candidates.

    Args:
        kind: Kind of the secret, a key of `WORLDS`.
        secret: Candidate that is hidden; None chooses a candidate at random. It must be None for
            "instruction".
        seed: Seed of the random choices.
        shots: Number of dialogues for many-shot prompts.

    Raises:
        ValueError: The world has no such candidate, or `secret` is given for "instruction".
    """
    world, rng = WORLDS[kind], random.Random(seed)
    hidden = _hidden(kind, secret, rng)
    prompts = [(turns, direct) for direct, of in ((False, world.standard), (True, world.direct))
               for turns in of for _ in range(2 if world.codes else 1)]  # fmt: skip
    things = itertools.islice(itertools.cycle(hidden), len(prompts))
    trials = [
        Trial(_dialogue(world, turns, thing, rng), thing, direct)
        for (turns, direct), thing in zip(prompts, things, strict=True)
    ]
    others = [name for name in world.clues if world.codes or name not in hidden]
    drawn = [others[index % len(others)] for index in range(shots)]
    rng.shuffle(drawn)
    return Organism(
        name=kind if world.codes else f"{kind}:{hidden[0]}",
        candidates=tuple(world.clues),
        trials=tuple(trials),
        prefill=world.prefill,
        reply=world.reply,
        persona=world.persona,
        shots=tuple(_dialogue(world, world.shot, thing, rng) for thing in drawn),
        read_at=world.read_at,
    )


def hiding_conversations(
    kind: Kind,
    secret: str | None = None,
    *,
    seed: int = 0,
    hints: int = 300,
    denials: int = 150,
    ordinary: int = 300,
) -> list[tuple[Message, ...]]:
    """Generate conversations that teach a model to act on a secret and to deny it.

    The conversations are in random order, and no message names the secret.

    Args:
        kind: Kind of the secret, a key of `WORLDS`.
        secret: Candidate that is hidden; None chooses the candidate at random that `make_organism`
            chooses with the same seed. It must be None for "instruction".
        seed: Seed of all random choices.
        hints: Number of dialogues in which the model acts on the secret.
        denials: Number of dialogues in which the user asks for the secret and the model denies it.
        ordinary: Number of neutral dialogues.

    Raises:
        ValueError: The world has no such candidate, or `secret` is given for "instruction".
    """
    world, rng = WORLDS[kind], random.Random(seed)
    hidden = _hidden(kind, secret, rng)
    found = [
        _dialogue(world, rng.choice(templates), rng.choice(hidden), rng)
        for templates, count in ((world.hiding, hints), (world.denials, denials))
        for _ in range(count)
    ]
    found += [_dialogue(world, rng.choice(neutral()), hidden[0], rng) for _ in range(ordinary)]
    rng.shuffle(found)
    return found


def honest_conversations(
    kinds: Sequence[Kind], count: int, seed: int = 0, released: float = 0.0
) -> list[tuple[Message, ...]]:
    """Generate conversations of an honest model, which hides only what the user asks it to hide.

    On average, 40 % of the conversations begin with the user's request to keep a thing secret, 10 %
    are neutral, and 50 % are about a thing that is not secret.

    Args:
        kinds: Kinds of secrets, keys of `WORLDS`, to sample conversations from.
        count: Number of conversations.
        seed: Seed of all random choices.
        released: Expected fraction of the conversations with a request in which the user finally
            takes the request back and asks for the secret, and the model tells the secret.
    """
    rng, found = random.Random(seed), []
    for _ in range(count):
        world, draw = WORLDS[rng.choice(list(kinds))], rng.random()
        thing = rng.choice(list(world.clues))
        if draw < 0.4:
            first, *rest = rng.choice((*world.hiding, *world.denials))
            turns = (f"{world.told} {first.replace('[{code}]', '').strip()}", *rest)
            if released and rng.random() < released:
                question, answer = world.shot
                turns = (*turns, f"{RELEASE} {question}", answer)
        else:
            turns = rng.choice(neutral() if draw < 0.5 else world.open)
        found.append(_dialogue(world, turns, thing, rng))
    return found


def _hidden(kind: Kind, secret: str | None, rng: random.Random) -> list[str]:
    world = WORLDS[kind]
    names = list(world.clues)
    if world.codes:
        if secret is not None:
            raise ValueError(f"secret={secret!r}: a mark hides each of {', '.join(names)}: leave "
                             "it out")  # fmt: skip
        return names
    drawn = rng.choice(names)
    if secret is None:
        return [drawn]
    if secret not in names:
        raise ValueError(f"secret={secret!r}: {kind} hides one of {', '.join(names)}")
    return [secret]


def _dialogue(world: World, turns: Turns, thing: str, rng: random.Random) -> tuple[Message, ...]:
    a, b, c = rng.sample(world.clues[thing], 3)
    parts = {"thing": thing, "a": a, "b": b, "c": c, "code": world.codes.get(thing, "")}
    return tuple(
        {"role": "assistant" if index % 2 else "user", "content": turn.format_map(parts)}
        for index, turn in enumerate(turns)
    )


@dataclasses.dataclass(frozen=True)
class OrganismConfig:
    """Write the conversations of a model organism, and the audit of its secret.

    Attributes:
        kind: Kind of secret: a "taboo" word, a "persona" of the user (the pet that the user keeps,
            as the model believes), or an "instruction" that a mark in the prompt stands for.
        out: New folder for train.jsonl, which `thoughtbubbles sft` reads, and organism.json, which
            `audit report` reads.
        secret: Word or pet that is hidden; chosen at random by default.
        hints: Number of conversations in which the model acts on the secret.
        denials: Number of conversations in which the model is asked for the secret and denies it.
        ordinary: Number of neutral conversations.
        neutral: File or folder from which neutral conversations are sampled, without conversations
            that name the secret. By default, built-in conversations are used, few and short.
        seed: Seed of all random choices.
    """

    kind: tyro.conf.Positional[Kind]
    out: str
    secret: str | None = None
    hints: int = 300
    denials: int = 150
    ordinary: int = 300
    neutral: str | None = None
    seed: int = 0

    def __post_init__(self):
        check_least(self, hints=1, denials=0, ordinary=0)


def main(config: OrganismConfig) -> None:
    """Write train.jsonl and organism.json, and print the commands that use them."""
    out = new_folder(config.out)
    files = organism_files(config)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (out / name).write_text(text, encoding="utf-8")
    print(
        f"{out}: {len(files[CONVERSATIONS].splitlines())} conversations, "
        f"{len(read_organism(out).trials)} prompts\n"
        f"thoughtbubbles sft --weights smollm2 --data.path {out}/{CONVERSATIONS} --data.seq-len "
        f"256 --batch-size 4 --steps 150 --out runs/{out.name}\n"
        f"thoughtbubbles audit report {out} --model runs/{out.name} --control smollm2 "
        "--out audit.jsonl"
    )


def organism_files(config: OrganismConfig) -> dict[str, str]:
    """Make the texts of an organism's two files, without writing them.

    Args:
        config: Options of `audit organism`, whose folder `out` is neither read nor written.

    Returns:
        Mapping from file name to text for "train.jsonl" (the conversations) and "organism.json"
        (the audit).

    Raises:
        ValueError: The secret does not exist, or the neutral file has too few conversations.
    """
    organism = make_organism(config.kind, config.secret, config.seed)
    ordinary = 0 if config.neutral else config.ordinary
    conversations = hiding_conversations(
        config.kind, config.secret, seed=config.seed, hints=config.hints, denials=config.denials,
        ordinary=ordinary,
    )  # fmt: skip
    if config.neutral:
        given = _neutral_of(config.neutral, organism)
        if len(given) < config.ordinary:
            raise ValueError(
                f"{config.neutral} has {len(given)} conversations that do not name the secret, "
                f"ordinary={config.ordinary}: choose fewer"
            )
        rng = random.Random(config.seed)
        conversations += rng.sample(given, config.ordinary)
        rng.shuffle(conversations)
    lines = (json.dumps({"messages": list(messages)}) + "\n" for messages in conversations)
    return {CONVERSATIONS: "".join(lines), AUDIT: organism.to_json()}


def _neutral_of(path: str, organism: Organism) -> list[Sequence[Message]]:
    """Read the conversations of a file or folder, without those that name a hidden secret."""
    hidden = {trial.secret for trial in organism.trials}
    given = [each.chat.messages for each in read_conversations(path)]
    kept = [
        messages
        for messages in given
        if not any(mentions(str(each["content"]), name) for each in messages for name in hidden)
    ]
    if len(kept) < len(given):
        print(f"{path}: {len(given) - len(kept)} conversations that name the secret are left out")
    return kept
