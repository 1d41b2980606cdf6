"""Dispatch the command line `thoughtbubbles COMMAND` to the module of the subcommand."""

import difflib
import importlib
import sys
from collections.abc import Mapping

COMMANDS = {
    "pretrain": ("train.pretrain", "train a model on text"),
    "sft": ("train.sft", "fine-tune a model on conversations"),
    "rl": ("train.rl.__main__", "train a model on tasks whose answers can be checked"),
    "play": ("train.play", "play an environment yourself, or watch a player"),
    "probe": ("train.rl.probe", "which problems of a task a model never solves"),
    "rejection": ("train.rl.rejection", "fine-tuning data from a policy and a verifier"),
    "demonstrations": ("train.demonstrations", "an environment's expert as chat data"),
    "battery": ("train.battery", "does a model read its prompt? success and validity by variant"),
    "generate": ("train.generate", "continue prompts, or answer them"),
    "evaluate": ("train.evaluate", "held-out loss of a run, or scores on task files"),
    "audit": ("train.audit.__main__", "what a model holds and does not say: lenses, features"),
    "export": ("train.export", "a run's model as a folder that other programs load"),
    "harness": ("train.harness", "EleutherAI's evaluation harness on our models"),
    "compile": ("train.compile", "memory and time of a training step on chips that are not here"),
    "benchmark": ("train.benchmark", "speed, side by side with a plain decoder"),
    "tokenizer": ("train.tokenizer", "train a tokenizer on a corpus"),
    "mixture": ("train.mixture", "weights of sources for wanted shares of labels"),
    "grow": ("train.grow", "more neurons for a trained Dragon Hatchling"),
    "merge": ("train.merge", "one Dragon Hatchling with the neurons of several"),
    "runs": ("train.list_runs", "compare run folders: configs, last metrics, curves"),
    "experiment": ("", "measure a claim of the documentation again"),
}
EXPERIMENTS = {
    "quality": "held-out loss of policies, side by side",
    "random_bits": "whether a policy lets a model see its future",
    "precision": "what bfloat16 costs in loss, and how often it forks elsewhere",
    "retrofit": "fork layers in a pretrained model",
    "hatchling_quality": "held-out loss of a Dragon Hatchling and of decoders of its size",
    "merge_languages": "Dragon Hatchlings tuned to other languages, merged untrained",
    "mixtures": "what more of one source does to a small model",
    "visual_priors": "what a frozen model makes of images, by the text that it learned from",
    "frozen_prompts": "whether a tuned model still reads what its prompt calls things",
    "sokoban_prompts": "the same on Sokoban: demonstrations, sft, battery, six arms side by side",
    "points_prompts": "the same on General Points, also on hands of training numbers",
    "memory": "MemGen against a LoRA, soft prompts and pause tokens",
    "reinforce": "RL methods on string tasks, against supervised tuning",
    "environments": "scores of random, scripted and trained players of environments",
    "broadening": "why more rollouts of a problem help: BroRL's theory, simulated",
    "plateau": "more rollouts of a problem or more steps, where training has flattened out: BroRL",
    "needle": "tree search against plain sampling at equal tokens: DeepSearch's planted needle",
    "synthesis": "memory, forks, tree search and budgets in one policy, and without each",
    "secrets": "methods that make a small model tell its secret, and what its bubbles know",
    "remember": "a trigger that learns when to remember",
}


def main() -> None:
    """Run the subcommand that the first argument names; an unknown name exits with status 2."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(_help("thoughtbubbles COMMAND", {name: line for name, (_, line) in COMMANDS.items()}))
        return
    name = _known(words.pop(0), COMMANDS, "command")
    module = COMMANDS[name][0]
    if name == "experiment":
        if not words or words[0] in ("-h", "--help"):
            print(_help("thoughtbubbles experiment NAME", EXPERIMENTS))
            return
        chosen = _known(words.pop(0), EXPERIMENTS, "experiment")
        name, module = f"{name} {chosen}", f"train.experiments.{chosen}"
    sys.argv = [f"thoughtbubbles {name}", *words]
    try:
        command = importlib.import_module(module).command
    except ModuleNotFoundError as error:
        print(f'error: {error}: pip install "thoughtbubbles[train]"', file=sys.stderr)
        sys.exit(2)
    command()


def _known(name: str, choices: Mapping[str, object], kind: str) -> str:
    if name not in choices:
        close = difflib.get_close_matches(name, choices, n=1)
        guess = f"perhaps {close[0]}? " if close else ""
        print(
            f"error: unknown {kind} {name!r}: {guess}choose one of {', '.join(choices)}",
            file=sys.stderr,
        )
        sys.exit(2)
    return name


def _help(usage: str, lines: Mapping[str, str]) -> str:
    width = max(map(len, lines))
    listed = "\n".join(f"  {name:<{width}}  {line}" for name, line in lines.items())
    return f"usage: {usage} [OPTIONS]\n\n{listed}\n\nOptions of each: {usage} --help"
