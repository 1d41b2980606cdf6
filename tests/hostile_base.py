"""What the hostile cases share: tiny runs, models of others, corpora and tokenizers."""

import json
import os
import random
import shutil
from pathlib import Path

from gguf_model import FIXTURES, write_gguf
from hostile_runs import Case, run_case, words_of

WORDS = words_of("""the quick brown fox jumps over a lazy dog while rain falls on green hills""")
TINY = words_of(
    """--model.embed-dim 8 --model.num-layers 2 --model.num-heads 2 --data.seq-len 16
    --batch-size 2 --steps 1 --save-every 1 --evaluation.rows 2 --evaluation.positions 4
    --data.corpus {base}/texts --data.cache-dir {base}/data"""
)
PRETRAIN = ("pretrain", "tiny", "--model.fork-layers", "1", *TINY)
SFT = words_of(
    """sft --weights {base}/plain --data.path {base}/chats.jsonl --data.seq-len 32 --batch-size
    2 --steps 1 --save-every 1 --evaluation.rows 2 --lora.rank 2 --data.validation 0.2"""
)
RL = words_of(
    """rl --weights {base}/plain --task copy(length=2) --method grpo --num-generations 2
    --batch-size 2 --steps 1 --save-every 1 --evaluation.rows 2 --max-new-tokens 2
    --lora.rank 2 --max-batches 1 --examples 0"""
)
HATCHLING = "hatchling(vocab_size=257, embed_dim=8, num_layers=2, num_heads=2, num_neurons=16)"
MADE = (
    Case("run", (*PRETRAIN, "--out", "{base}/run")),
    Case("plain", ("pretrain", "tiny_plain", *TINY, "--out", "{base}/plain")),
    Case(
        "hatchling",
        ("pretrain", "tiny", "--architecture", HATCHLING, *TINY[6:], "--out", "{base}/hatchling"),
    ),
    Case("tuned", (*SFT, "--out", "{base}/tuned")),
    Case("rl", (*RL, "--out", "{base}/rl")),
    Case(
        "tokenizer",
        words_of("""tokenizer --corpus {base}/texts --vocab-size 300 --out {base}/bpe.json"""),
    ),
    Case("export", words_of("export {base}/plain --to {base}/exported")),
    Case("adapter", words_of("export {base}/tuned --to {base}/adapter --adapter-only")),
    Case(
        "grown", words_of("grow --checkpoint {base}/hatchling --num-neurons 32 --out {base}/grown")
    ),
    Case(
        "probe",
        words_of(
            """probe --weights {base}/plain --task copy(length=2) --samples 2 --pool 2
            --batch-size 2 --max-new-tokens 2 --out {base}/probe.jsonl"""
        ),
    ),
    Case(
        "organism",
        words_of("audit organism taboo --hints 2 --denials 2 --ordinary 2 --out {base}/organism"),
    ),
    Case(
        "sae",
        words_of(
            """audit sae --checkpoint {base}/run --tokens 32 --batch-size 16 --rows 2 --buffer 32
            --features 16 --k 2 --held-out 2 --out {base}/sae"""
        ),
    ),
    Case(
        "lens",
        words_of(
            """audit tuned-lens --checkpoint {base}/run --steps 1 --batch-size 2 --held-out 2 --out
            {base}/lens"""
        ),
    ),
)


def make_base(base: Path, work: Path) -> None:
    """Write the files and train the runs.

    Args:
        base: Folder to fill.
        work: Folder for what the commands print.
    """
    rng = random.Random(0)
    (base / "texts").mkdir(parents=True)
    for index in range(20):
        text = "\n".join(" ".join(rng.choices(WORDS, k=8)) for _ in range(20))
        (base / f"texts/{index}.txt").write_text(text)
    chats = [
        {"messages": [{"role": "user", "content": rng.choice(WORDS)},
                      {"role": "assistant", "content": rng.choice(WORDS)}]}
        for _ in range(20)
    ]  # fmt: skip
    (base / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    items = [{"query": "a", "choices": ["b", "c"], "gold": 0}] * 3
    (base / "task.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    problems = [{"question": "1+1?", "answer": "#### 2"}] * 3
    (base / "gsm.jsonl").write_text("".join(json.dumps(item) + "\n" for item in problems))
    for name in ("smollm3", "qwen2"):
        shutil.copytree(FIXTURES / name, base / name)
    write_gguf(base / "model.gguf", "llama_linear")
    write_gguf(base / "quantised.gguf", "llama", quantised=True)
    os.mkfifo(base / "pipe")
    write_texts(base)
    for case in MADE:
        outcome = run_case(case, base, work / case.name)
        assert outcome.status == 0, outcome.text


def write_texts(base: Path) -> None:
    """One text in each packed form that a corpus may have."""
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as parquet

    texts = [file.read_text() for file in sorted((base / "texts").iterdir())]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (base / "lines.jsonl").write_bytes(lines)
    (base / "lines.jsonl.gz").write_bytes(gzip.compress(lines))
    with pa.output_stream(str(base / "lines.jsonl.zst"), compression="zstd") as stream:
        stream.write(lines)
    parquet.write_table(pa.table({"text": texts}), base / "rows.parquet")
