"""Hostile cases of options that are objects, `name(...)`, and of whole command lines."""

import itertools
from collections.abc import Iterator

from hostile_base import PRETRAIN, RL
from hostile_commands import numeric, with_option
from hostile_runs import Case, words_of

LITERALS = [
    "-1",
    "0",
    str(10**19),
    "1e308",
    "1e999",
    "None",
    "'x'",
    "[1]",
    "True",
    "{}",
    str(2**31),
]


def of_objects() -> Iterator[Case]:
    """Options of tasks, environments, methods, parts of methods and policies."""
    from thoughtbubbles import ARCHITECTURES
    from thoughtbubbles.policies import POLICIES
    from train.rl.named_tasks import tasks_by_name
    from train.rl.parts import KINDS

    literals = itertools.cycle(LITERALS)
    for name, kind in tasks_by_name().items():
        for option, _ in numeric(kind):
            given = {"gsm8k": "path='{base}/gsm.jsonl', "}.get(name, "")
            text = f"{name}({given}{option}={next(literals)})"
            yield Case(f"play {text}", ("play", text, "--player", "random"))
    rl = (*RL, "--out", "{here}/out", "--dry-run")
    seen = set()  # methods share most of their options
    for part, (_, registry) in KINDS.items():
        for name, chosen in registry.items():
            for option, _ in numeric(chosen):
                if (part, option) in seen:
                    continue
                seen.add((part, option))
                text = f"{name}({option}={next(literals)})"
                yield Case(f"rl {part} {text}", with_option(rl, f"--{part}", text))
    pretrain = (*PRETRAIN, "--out", "{here}/out", "--dry-run")
    for name, kind in POLICIES.items():
        for (option, _), value in itertools.product(numeric(kind), LITERALS[2:6]):
            text = f"{name}({option}={value})"
            yield Case(f"policy {text}", (*pretrain, f"--model.policy={text}"))
            break
    for name, entry in ARCHITECTURES.items():
        for option, _ in numeric(entry.config_class):
            text = f"{name}({option}={next(literals)})"
            words = ("pretrain", "tiny", "--architecture", text, "--out", "{here}/out", "--dry-run")
            yield Case(f"architecture {text}", words)


MALFORMED = [
    "", " ", "(", ")", "()", "f", "NAME(", "NAME)", "NAME()()", "NAME(1)", "NAME(*[1])",
    "NAME(**{'a': 1})", "NAME(x=1, x=2)", "NAME(nope=1)", "NAME.x", "NAME[0]", "NAME:", "NAME:x",
    "NAME;import os", "lambda: 0", "NAME(__class__=1)", "NAME(" * 3000,
    "NAME(x=" + "[" * 5000 + ")",
    "NAME(" + "a" * 100_000 + "=1)", "NAME\0", "NAME\n()", "NÄME", "NAME(seed=-1)", "-", "--",
    "NAME(x=9**9**9)", "NAME(x=1" + "0" * 5000 + ")", "NAME(x=__import__('os'))",
]  # fmt: skip


def of_malformed() -> Iterator[Case]:
    """Texts that are no call, where one is expected."""
    pretrain, rl = (*PRETRAIN, "--dry-run"), (*RL, "--dry-run")
    places = {
        "method": lambda text: with_option(rl, "--method", text),
        "task": lambda text: with_option(rl, "--task", text),
        "policy": lambda text: (*pretrain, f"--model.policy={text}"),
        "corpus": lambda text: with_option(pretrain[:-1], "--data.corpus", text),
        "play": lambda text: ("play", text, "--player", "random"),
        "architecture": lambda text: ("pretrain", "tiny", "--architecture", text, "--dry-run"),
    }
    names = {"method": "grpo", "task": "copy", "policy": "PrefixRank", "corpus": "mix",
             "play": "hanoi", "architecture": "thoughtbubbles"}  # fmt: skip
    turn = itertools.cycle(places)
    for index, text in enumerate(MALFORMED * 2):
        place = next(turn)
        if index % len(MALFORMED) == 0:
            next(turn)  # so that a text meets another place the next time
        written = text.replace("NAME", names[place])
        yield Case(f"malformed {place} {index} {written[:40]!r}", _words(places[place](written)))
    mixtures = [
        "mix()", "mix({})", "mix({'a': 1", "mix({'stdlib': nan})", "mix({'stdlib': 1e999})",
        "mix({'stdlib': -1})", "mix({'stdlib': 0})", "mix({'stdlib': '1'})", "mix([1])",
        "mix({'stdlib': 0.5, 'stdlib': 0.5})", "mix({1: 1})", "mix({'mix({})': 1})",
        "mix({'{base}/texts': 1e-300})", "mix({'{base}/texts': 1e308})",
        "files()", "files(path='')", "files(path=3)", "files(path='{base}/texts', field=3)",
        "files(path='{base}/lines.jsonl', field='nope')", "tfds:", "tfds:nope/nope/nope", "tfds:..",
        "mix({'{base}/texts': True})", "mix({'{base}/texts': 10**400})",
    ]  # fmt: skip
    for text in mixtures:
        words = with_option((*PRETRAIN, "--out", "{here}/out"), "--data.corpus", text)
        yield Case(f"mixture {text}", words)


def _words(words: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(word.replace("\0", "\x01") for word in words)  # no process can be given a zero


def of_words() -> Iterator[Case]:
    """Words of the command line itself."""
    lines = """
    pretrain --steps|pretrain nope|pretrain --nope 3|pretrain tiny tiny|pretrain --steps 3 4
    pretrain --model.policy|pretrain --architecture|pretrain --plugin|pretrain --plugin ..|sft tiny
    rl --train nope|rl --reward|rl --weights|generate|generate --checkpoint|generate --model nope
    generate --checkpoint {base}/run --model smollm2|generate --checkpoint {base}/run --chat
    generate --checkpoint {base}/nope|generate --checkpoint {base}|generate --checkpoint /dev/null
    generate --checkpoint {base}/run --figure {here}/x/y.png|generate --checkpoint {base}/run/1/meta
    generate --checkpoint {base}/run --figure {here}/y.txt --prompt a
    generate --checkpoint {base}/run --policy nope|generate --checkpoint {base}/plain --ratio 2
    generate --model {base}/smollm3 --adapter {base}/run|generate --model {base}/texts
    generate --model {base}/smollm3 --adapter {base}/nope|generate --model {base}/chats.jsonl
    evaluate|evaluate --checkpoint {base}/nope|evaluate --model {base}/smollm3
    evaluate --checkpoint {base}/run --tasks {base}/nope.jsonl|evaluate --checkpoint {base}/tuned
    evaluate --checkpoint {base}/run --tasks {base}/chats.jsonl|evaluate --checkpoint {base}/rl
    evaluate --checkpoint {base}/run --tasks {base}/run|evaluate --checkpoint {base}/run --tasks /
    evaluate --checkpoint {base}/run --tasks {base}/task.jsonl --json {here}
    evaluate --checkpoint {base}/run --tasks {base}/task.jsonl --json {base}/texts/0.txt/x
    evaluate --checkpoint {base}/plain --sweep 2|evaluate --checkpoint {base}/run --sweep nan
    export|export {base}/run|export {base}/nope --to {here}/out|export {base} --to {here}/out
    export {base}/run --to {base}/texts|export {base}/run --to {base}/run
    export {base}/run --to {base}/texts/0.txt|export {base}/run --to {base}/texts/0.txt/x
    export {base}/run --to {here}/out --step 7|export {base}/run --to {here}/out --step x
    export {base}/run --to {here}/out --dtype int8|export {base}/run --to ""
    export {base}/run --to {here}/out --format transformers|export {base}/texts --to {here}/out
    export {base}/model.gguf --to {here}/out --step 1|export /dev/zero --to {here}/out
    tokenizer --corpus {base}/nope|tokenizer --corpus {base}/texts --out {here}/x/y.json
    tokenizer --corpus {base}/texts --out {here} --vocab-size 300|tokenizer --corpus /dev/null
    tokenizer --corpus {base}/texts --out /dev/full --vocab-size 300
    mixture|mixture --sources {base}/nope|mixture --shares a=1
    mixture --sources {base}/texts --shares a
    mixture --sources {base}/texts --shares code=nan|mixture --sources {base}/texts --shares code=2
    mixture --sources {base}/texts --labelled {base}/chats.jsonl|mixture --labelled /dev/null
    grow|grow --checkpoint {base}/run --num-neurons 32 --out {here}/out
    grow --checkpoint {base}/hatchling --num-neurons 17 --out {here}/out
    grow --checkpoint {base}/hatchling --num-neurons 32 --out {base}/hatchling
    grow --checkpoint {base}/nope --num-neurons 32 --out {here}/out
    merge|merge --checkpoints {base}/hatchling --out {here}/out
    merge --checkpoints {base}/hatchling {base}/run --out {here}/out
    merge --checkpoints {base}/hatchling {base}/nope --out {here}/out
    runs|runs {base}/nope|runs {base}/texts|runs {base}/run --metric nope|runs {base}/run --figure x
    runs {base}/run --figure {here}/a/b.png|runs /dev/null|runs {base}/texts/0.txt
    compile|compile --topology nope|compile --topology v5e:99999x99999|compile --topology v5e:-1
    compile --topology v5e:2x4 --steps 0|compile --topology h100:0|compile --preset nope
    compile --topology v5e:2x4 --mesh data=99999999999999|compile --mesh
    compile --topology h100:99999999999999999999|compile --topology v5e:2x4 --batch-size 7
    benchmark nope|benchmark step --dtype int3|benchmark decode --model nope
    benchmark accelerator --parts nope
    benchmark accelerator --minutes nan|benchmark accelerator --compile-for nope --table
    play nope|play copy --player nope|play copy --index 10000000000000000000000|play gsm8k:/dev/null
    play gsm8k:{base}/nope|play gsm8k:{base}/texts|play gsm8k:{base}/chats.jsonl|play gem:nope
    play reasoning_gym:nope|play copy --split nope|play gem:|play reasoning_gym:
    probe --weights {base}/plain --task nope|probe --weights {base}/nope
    probe --weights {base}/plain --task copy(length=2) --samples 2 --pool 2 --out {here}
    rejection|rejection --weights {base}/plain --task hanoi --data r_tuning --out {here}/out.jsonl
    rejection --weights {base}/plain --task copy --data r_tuning --strategy best_of
    rejection --weights {base}/plain --task copy --out {base}/chats.jsonl
    demonstrations|demonstrations copy|demonstrations nope|demonstrations general_points(maps=99)
    demonstrations sokoban_variants --out {here}/a/id.jsonl --battery {here}/a --count 1
    battery|battery --checkpoint {base}/nope|battery --checkpoint {base}/plain --battery.task copy
    battery --checkpoint {base}/plain --battery.task general_points --battery.variants nope
    battery --checkpoint {base}/plain --battery.task general_points --json {here}
    audit|audit nope|audit lens|audit lens --checkpoint {base}/run --model {base}/smollm3
    audit lens --checkpoint {base}/run --sites nope|audit lens --checkpoint {base}/hatchling
    audit lens --checkpoint {base}/plain --tuned {base}/lens|audit lens --checkpoint {base}/rl
    audit sae --checkpoint {base}/run --k 99 --features 9 --out {here}/out|audit sae
    audit tuned-lens --checkpoint {base}/plain --seq-len 1 --out {here}/out
    audit organism|audit organism nope --out {here}/out|audit organism taboo --out {base}/texts
    audit organism taboo --neutral {base}/lines.jsonl --out {here}/out
    audit secret|audit secret taboo --weights {base}/nope --out {here}/out
    audit secret taboo --weights {base}/hatchling --out {here}/out
    audit secret taboo --weights {base}/smollm3 --lora.targets nope --out {here}/out
    audit report|audit report {base}/organism|audit report {base}/organism --model {base}/run
    audit report {base}/chats.jsonl --model {base}/run --control {base}/run --out {here}/out.jsonl
    audit report {base}/organism --model {base}/run --control {base}/hatchling --methods io
    harness|harness nope|harness --plugin nope|harness run --model nope
    experiment|experiment nope|experiment quality --nope|experiment random_bits --steps x
    experiment reinforce --methods nope|experiment needle --seeds -1|experiment precision --nope 1
    rl --weights {base}/plain --task gsm8k:{base}/chats.jsonl --dry-run|rl --weights {base}/texts
    rl --weights {base}/plain --task copy --train trigger --dry-run|rl --weights {base}/chats.jsonl
    rl --weights {base}/plain --task copy --train weaver --lora.targets q q --dry-run
    rl --weights {base}/plain --task copy --lora.targets nope --dry-run
    sft --weights {base}/plain --data.path {base}/nope --dry-run|sft --weights {base}/nope
    sft --weights {base}/plain --data.path {base}/texts|sft --weights {base}/plain
    sft --weights {base}/plain --data.path {base}/lines.jsonl
    sft --weights {base}/plain --data.path {base}/chats.jsonl --data.end-token nope
    """
    for line in filter(None, (part.strip() for part in lines.replace("\n", "|").split("|"))):
        words = words_of(line)
        out = "out" if words[0] in ("export", "grow", "merge", "audit") else ""
        if words[0] in ("sft", "rl") and "--out" not in words:
            words = (*words, "--out", "{here}/out")
        yield Case(f"words {line}", words, None, out)
