"""Hostile cases of files: other people's weights, corpora, templates, prompts, paths, damage."""

import gzip
import itertools
import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gguf_model import write_gguf
from hostile_base import PRETRAIN, SFT
from hostile_commands import EVALUATE, with_option
from hostile_runs import Case, words_of

Make = Callable[[Path, Path], object]
WRONG: list[Any] = [
    "32", 32.5, 1e308, [1], [[]], {}, True, None, -1, 0, 10**7, 10**19, 10**4000, "x" * 100_000,
    {"a": {"b": []}}, float("nan"),
]  # fmt: skip
EXPORT = ("export", "{here}/model", "--to", "{here}/out")
DEEP = "[" * 100_000 + "]" * 100_000


def json_field(model: str, file: str, path: str, value: Any) -> Make:
    """A copy of a model of which one field of a JSON file has another value."""

    def make(here: Path, base: Path) -> None:
        shutil.copytree(base / model, here / "model")
        content = json.loads((here / "model" / file).read_text())
        inside, (*parts, last) = content, path.split(".")
        for part in parts:
            inside = inside[int(part) if part.isdigit() else part]
        inside[int(last) if isinstance(inside, list) else last] = value
        (here / "model" / file).write_text(json.dumps(content))

    return make


def whole_file(model: str, file: str, content: bytes | None) -> Make:
    """A copy of a model of which one file has another content, or is missing."""

    def make(here: Path, base: Path) -> None:
        shutil.copytree(base / model, here / "model")
        if content is None:
            (here / "model" / file).unlink()
        else:
            (here / "model" / file).write_bytes(content)

    return make


def header_field(path: str, value: Any) -> Make:
    """A copy of smollm3 of which one field of the safetensors header has another value."""

    def make(here: Path, base: Path) -> None:
        shutil.copytree(base / "smollm3", here / "model")
        file = here / "model/model.safetensors"
        content = file.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
        if path:
            header["model.norm.weight"][path] = value
        else:
            header["model.norm.weight"] = value
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])

    return make


def shortened(value: Any) -> str:
    return repr(value)[:30]


def of_models() -> Iterator[Case]:
    """Wrong types in what other people's models are made of."""
    fields = {
        "config.json": """model_type hidden_act rope_theta rope_parameters rope_scaling layer_types
        num_attention_heads hidden_size head_dim vocab_size num_hidden_layers num_key_value_heads
        intermediate_size rms_norm_eps tie_word_embeddings no_rope_layers eos_token_id
        bos_token_id torch_dtype quantization_config max_position_embeddings""",
        "tokenizer.json": """model model.type model.vocab model.merges added_tokens normalizer
        pre_tokenizer decoder post_processor added_tokens.0.id added_tokens.0.content version""",
        "tokenizer_config.json": """chat_template bos_token eos_token added_tokens_decoder
        add_bos_token tokenizer_class model_max_length""",
        "generation_config.json": "eos_token_id temperature",
    }
    index = 0
    for file, names in fields.items():
        for name in names.split():
            for _ in range(2):
                value = WRONG[index % len(WRONG)]
                index += 1
                make = json_field("smollm3", file, name, value)
                yield Case(f"{file} {name} {shortened(value)}", EXPORT, make, "out")
    values = [[], {}, "x", -1, [1e400], [2**63], None, [[1, 2]], 1.5, [-1], [0, 10**15]]
    places = itertools.cycle(["", "dtype", "shape", "data_offsets"])
    for index, (value, path) in enumerate(zip(values * 2, places, strict=False)):
        yield Case(f"header {index} {path} {value}", EXPORT, header_field(path, value), "out")
    contents = [
        b"",
        b"{",
        DEEP.encode(),
        b"\xff\xfe{}",
        b"[]",
        b"null",
        b"1",
        b'{"a":' * 5000,
        None,
    ]
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
                 "model.safetensors"):  # fmt: skip
        for content in contents:
            make = whole_file("smollm3", file, content)
            yield Case(f"{file} is {content and content[:9]}", EXPORT, make, "out")
    shards: list[Any] = [3, "../x", "/dev/zero", "nope", None, [], "."]
    for value in [[], {}, {"a": 1}, None, "x", *({"model.norm.weight": x} for x in shards)]:
        make = json_field("qwen2", "model.safetensors.index.json", "weight_map", value)
        yield Case(f"index {value}", EXPORT, make, "out")


def of_gguf() -> Iterator[Case]:
    """Wrong metadata of a GGUF file."""
    keys = """general.architecture llama.block_count llama.context_length llama.embedding_length
    llama.feed_forward_length llama.attention.head_count llama.attention.head_count_kv
    llama.attention.layer_norm_rms_epsilon llama.rope.freq_base llama.rope.scaling.factor
    llama.rope.dimension_count tokenizer.ggml.model tokenizer.ggml.pre tokenizer.ggml.tokens
    tokenizer.ggml.token_type tokenizer.ggml.merges tokenizer.ggml.eos_token_id
    tokenizer.chat_template llama.rope.scaling.type llama.attention.key_length"""
    values: list[Any] = ["32", 32.5, -1, 0, 10**7, 2**31 - 1, True, [1], ["x"], [0.5], None]
    words = ("export", "{here}/model.gguf", "--to", "{here}/out")
    for index, key in enumerate(keys.split()):
        for turn in range(2):
            value = values[(2 * index + turn) % len(values)]

            def make(here: Path, base: Path, key: str = key, value: Any = value) -> None:
                del base
                write_gguf(here / "model.gguf", "llama_linear", changes={key: value})

            yield Case(f"gguf {key} {value}", words, make, "out")


def of_templates() -> Iterator[Case]:
    """Templates that would take the machine, and wrong ones."""
    templates = [
        "{{ '%999999999d' % 1 }}", "{{ 9**(9**9) }}", "{{ 'a' * 10**12 }}", "{{ [0] * 10**10 }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ ''.__class__ }}", "{{ self.__init__.__globals__ }}", "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}", "{{ messages", "{% for %}", "{% if 1 %}", "{{ 1/0 }}", "",
        "{{ raise_exception('no\nno') }}", "{{ messages[10**9] }}", "{{ messages[0].content }}" * 9,
        "{{ (2**255)*(2**255) }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a'|center(10**11) }}", "{% set x = 'ab' %}{% for i in range(60) %}{% endfor %}" * 50,
        "{{ " + "(" * 5000 + ")" * 5000 + " }}", "{{ undefined.nope }}", "{{ range(10**10)|list }}",
        "x" * 3_000_000, "{{ '{0:{1}}'.format(1, 999999999) }}", "{{ lipsum(n=10**9) }}",
        "{% for m in messages %}{{ m.content }}{{ '\\ud800' }}{% endfor %}",
        "{{ cycler.__init__ }}",
        "{% generation %}", "{%- break %}", "{{ strftime_now('%Y' * 99999) }}", "{{ namespace() }}",
    ]  # fmt: skip
    sft = with_option(SFT, "--weights", "{here}/model")
    chat = ("generate", "--model", "{here}/model", "--chat", "--prompt", "a", "--max-new-tokens=1")
    for index, template in enumerate(templates):

        def make(here: Path, base: Path, template: str = template) -> None:
            shutil.copytree(base / "smollm3", here / "model")
            (here / "model/chat_template.jinja").write_text(template)

        words = (*sft, "--out", "{here}/out") if index % 2 else chat
        yield Case(f"template {index} {template[:40]}", words, make)


def of_prompts() -> Iterator[Case]:
    prompts = ["", "\x01", "a" * 20_000, "\udcff\udcfe", "\udc80", "é" * 500, "\U0001f600", "\n\n",
               "<|im_start|>", "<|endoftext|>" * 50, "{{ 9**9 }}", "%s%n", "--",
               "\u202e"]  # fmt: skip
    run = ("generate", "--checkpoint", "{base}/run", "--max-new-tokens=1", "--prompt")
    chat = ("generate", "--model", "{base}/smollm3", "--chat", "--max-new-tokens=1", "--prompt")
    # As users compile it: the flags that make compiling quick make this four times as long.
    compiled = (("XLA_FLAGS", ""),)
    for index, prompt in enumerate(prompts):
        environment = compiled if len(prompt) > 10_000 else ()
        yield Case(
            f"prompt {index}", (*(chat if index % 2 else run), prompt), None, "", environment
        )
    yield Case("prompt of 30,000 characters", (*chat, "ab " * 10_000), None, "", compiled)
    yield Case("500 prompts", (*run, *(["a"] * 500)))
    long = ("--max-new-tokens", str(2**31 - 1), "--prompt", "a")
    yield Case("2^31 new tokens", ("generate", "--checkpoint", "{base}/run", *long))


def of_corpora() -> Iterator[Case]:
    """Texts in odd encodings, packed files that are none, and paths that are no files."""
    line = json.dumps({"text": "abc " * 100}) + "\n"
    contents: dict[str, bytes] = {
        "empty.txt": b"", "nul.txt": b"\0" * 10_000, "latin.txt": "é ".encode("latin-1") * 500,
        "utf16.txt": ("abc " * 500).encode("utf-16"), "bom.txt": b"\xef\xbb\xbf" + b"abc " * 500,
        "half.txt": b"abc \xe2\x82" * 300, "cr.txt": b"abc\rdef\r" * 300, "one.txt": b"a",
        "long.txt": b"x" * 3_000_000, "surrogate.jsonl": b'{"text": "\\ud800"}\n' * 50,
        "wrong.jsonl": b'{"text": 3}\n' * 9, "none.jsonl": b'{"text": null}\n' * 9,
        "list.jsonl": b"[1]\n" * 9, "half.jsonl": line.encode() * 9 + b'{"text": "ab',
        "deep.jsonl": DEEP.encode() + b"\n", "other.jsonl": b'{"content": "a"}\n' * 9,
        "latin.jsonl": '{"text": "é"}\n'.encode("latin-1") * 9, "empty.jsonl": b"\n\n\n",
        "huge.jsonl": b'{"text": ' + b"9" * 5000 + b"}\n", "nan.jsonl": b"NaN\n" * 9,
        "twice.jsonl": b'{"text": "a", "text": "b"}\n' * 50, "fake.gz": b"abc" * 50,
        "fake.jsonl.gz": b"abc" * 50, "fake.jsonl.zst": b"abc" * 50, "fake.parquet": b"PAR1abc",
        "bomb.jsonl.gz": gzip.compress(b" " * 30_000_000), "fake.json": b"{}",
        "pic.png": b"\x89PNG",
        "fake.zip": b"PK\3\4", "array.json": b"[" + line.encode() * 2 + b"]", "a.jsonl.bz2": b"BZh",
    }  # fmt: skip
    pretrain = (*PRETRAIN, "--out", "{here}/out")
    sft = (*SFT, "--out", "{here}/out")
    for name, content in contents.items():
        make = lambda here, base, n=name, c=content: (here / n).write_bytes(c)  # noqa: E731
        path = f"{{here}}/{name}"
        yield Case(f"corpus {name}", with_option(pretrain, "--data.corpus", path), make)
        if "json" in name or "parquet" in name:
            yield Case(f"chats {name}", with_option(sft, "--data.path", path), make)
    chats: list[Any] = [
        {"messages": []}, {"messages": None}, {"messages": "a"}, {"messages": [1]}, {}, [], 3, None,
        {"messages": [{"role": "user"}]}, {"messages": [{"role": 3, "content": "a"}]},
        {"messages": [{"role": "user", "content": 3}]}, {"conversations": [{"from": "x"}]},
        {"messages": [{"role": "user", "content": "a"}]}, {"instruction": 3, "output": None},
        {"messages": [{"role": "assistant", "content": "a" * 100_000}]}, {"text": "a"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]},
        {"messages": [{"role": "assistant", "content": "a", "weight": "x"}]},
        {"messages": [{"role": "assistant", "content": "a"}] * 2, "tools": 3},
        {"messages": [{"role": "assistant", "content": [{"type": "image"}]}]},
    ]  # fmt: skip
    for index, chat in enumerate(chats):
        text = (json.dumps(chat) + "\n") * 9
        make = lambda here, base, t=text: (here / "c.jsonl").write_text(t)  # noqa: E731
        yield Case(f"chat {index}", with_option(sft, "--data.path", "{here}/c.jsonl"), make)
        task = with_option(EVALUATE, "--tasks", "{here}/c.jsonl")
        if index % 3 == 0:
            yield Case(f"task of chat {index}", task, make)


def of_paths() -> Iterator[Case]:
    """FIFOs, folders, links in circles and files where others are meant."""
    makers: dict[str, Make] = {
        "fifo": lambda here, base: os.mkfifo(here / "x"),
        "folder": lambda here, base: (here / "x").mkdir(),
        "loop": lambda here, base: os.symlink(here / "x", here / "x"),
        "dangling": lambda here, base: os.symlink(here / "nope", here / "x"),
        "file": lambda here, base: (here / "x").write_text("a"),
        "socket": _socket,
        "unreadable": lambda here, base: ((here / "x").write_text("a"), (here / "x").chmod(0)),
        "fifo inside": lambda here, base: ((here / "x").mkdir(), os.mkfifo(here / "x/a.txt")),
        "fifo as weights": _fifo_in("smollm3", "model.safetensors"),
        "fifo as config": _fifo_in("smollm3", "config.json"),
        "fifo in a run": _fifo_in("run", "1/meta/metadata"),
    }
    rl = ("rl", "--weights", "{base}/plain", "--task", "gsm8k:{here}/x", "--dry-run")
    commands = {
        "export": ("export", "{here}/x", "--to", "{here}/out"),
        "generate": ("generate", "--checkpoint", "{here}/x", "--prompt", "a"),
        "corpus": with_option((*PRETRAIN, "--out", "{here}/out"), "--data.corpus", "{here}/x"),
        "chats": with_option((*SFT, "--out", "{here}/out"), "--data.path", "{here}/x"),
        "rl": rl,
        "runs": ("runs", "{here}/x"),
        "tasks": with_option(EVALUATE, "--tasks", "{here}/x"),
        "tokenizer": (*PRETRAIN, "--out", "{here}/out", "--data.tokenizer", "{here}/x"),
        "out": (*PRETRAIN, "--out", "{here}/x"),
        "export to": ("export", "{base}/run", "--to", "{here}/x/out"),
    }
    for made, make in makers.items():
        for index, (name, words) in enumerate(commands.items()):
            if "in a" not in made and "as" not in made or index < 2:
                out = "out" if name == "export" else ""
                yield Case(f"{made} for {name}", words, make, out)


def _socket(here: Path, base: Path) -> None:
    import socket

    del base
    before = os.getcwd()
    os.chdir(here)  # paths of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("x")
    finally:
        os.chdir(before)


def _fifo_in(of: str, file: str) -> Make:
    def make(here: Path, base: Path) -> None:
        shutil.copytree(base / of, here / "x")
        (here / "x" / file).unlink()
        os.mkfifo(here / "x" / file)

    return make


def of_damage(count: int = 60) -> Iterator[Case]:
    """Bit flips and truncations at seeded places of every kind of file."""
    pretrain = (*PRETRAIN, "--out", "{here}/out", "--dry-run")[:-1]
    tokenizer = ("tokenizer", "--vocab-size", "300", "--out", "{here}/new.json", "--corpus")
    corpus = lambda name: (*tokenizer, f"{{here}}/{name}")  # noqa: E731
    chats = with_option((*SFT, "--out", "{here}/out"), "--data.path", "{here}/chats.jsonl")
    generate = words_of("generate --checkpoint {here}/run --max-new-tokens 1 --prompt ab")
    export = lambda name: ("export", f"{{here}}/{name}", "--to", "{here}/out")  # noqa: E731
    targets: list[tuple[str, str, tuple[str, ...]]] = [
        ("smollm3", "model.safetensors", export("smollm3")),
        ("smollm3", "tokenizer.json", export("smollm3")),
        ("qwen2", "model-00002-of-00003.safetensors", export("qwen2")),
        ("model.gguf", "", export("model.gguf")),
        ("quantised.gguf", "", export("quantised.gguf")),
        ("run", "1/params", generate),
        ("run", "1/meta/metadata", generate),
        ("run", "1/train", with_option((*PRETRAIN, "--out", "{here}/run"), "--steps", "2")),
        ("exported", "model.safetensors", export("exported")),
        ("rows.parquet", "", corpus("rows.parquet")),
        ("lines.jsonl.gz", "", corpus("lines.jsonl.gz")),
        ("lines.jsonl.zst", "", corpus("lines.jsonl.zst")),
        ("lines.jsonl", "", corpus("lines.jsonl")),
        ("chats.jsonl", "", chats),
        ("bpe.json", "", (*pretrain, "--data.tokenizer", "{here}/bpe.json")),
    ]
    for index in range(count):
        of, file, words = targets[index % len(targets)]
        make = _damaged(of, file, index)
        out = "out" if words[0] == "export" else ""
        kind = "cut" if index // len(targets) % 2 else "flip"
        yield Case(f"damage {index} {kind} {of} {file}", words, make, out)


def _damaged(of: str, file: str, seed: int) -> Make:
    def make(here: Path, base: Path) -> None:
        rng = random.Random(seed)
        if (base / of).is_dir():
            shutil.copytree(base / of, here / of)
        else:
            shutil.copy(base / of, here / of)
        path = here / of / file if file else here / of
        if path.is_dir():
            path = rng.choice(
                sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size)
            )
        content = bytearray(path.read_bytes())
        if seed // 15 % 2:
            content = content[: rng.randrange(len(content))]
        else:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)

    return make
