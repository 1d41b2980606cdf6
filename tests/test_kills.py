"""`kill -9` of each kind of work at a random moment: nothing half-written, and the same in the end.

python -m pytest -n 0 tests/test_kills.py -m experiment

Kills of two processes, of a save, and of a plain run are in `test_distributed.py`,
`test_checkpoint.py` and `test_pretrain.py`.
"""

import dataclasses
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from hostile_base import PRETRAIN, RL, SFT, make_base
from hostile_commands import SAMPLED, with_option
from hostile_runs import preload, words_of
from processes import QUICK, Process
from test_metrics import without_time

from thoughtbubbles import ModelConfig, Thoughtbubbles
from thoughtbubbles.pretrained import save_pretrained
from train.data.tokenizers import ByteTokenizer
from train.runs.checkpoint import load_params

PROGRAM = "from train.cli.main import main; main()"
AUDITED = words_of("--checkpoint {base}/run --corpus {base}/texts --seq-len 16 --held-out 2")


def options(words: tuple[str, ...], **values: str) -> tuple[str, ...]:
    for name, value in values.items():
        words = with_option(words, f"--{name.replace('_', '-')}", value)
    return words


def curve(out: Path) -> list[dict[str, object]]:
    timed = ("second", "data_wait", "goodput", "mfu", "memory")
    return [
        {name: value for name, value in line.items() if not any(part in name for part in timed)}
        for line in without_time(out)
    ]


def same_run(ours: Path, theirs: Path) -> None:
    assert curve(ours) == curve(theirs)
    jax.tree.map(np.testing.assert_array_equal, load_params(ours)[1], load_params(theirs)[1])


def same_arrays(ours: Path, theirs: Path) -> None:
    jax.tree.map(np.testing.assert_array_equal, load_params(ours)[1], load_params(theirs)[1])


def content(path: Path) -> dict[str, bytes]:
    """Bytes of a file, or of each file of a folder whose name is not hidden."""
    files = [path] if path.is_file() else [p for p in path.rglob("[!.]*") if p.is_file()]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def same_bytes(ours: Path, theirs: Path) -> None:
    assert content(ours) == content(theirs)


@dataclasses.dataclass(frozen=True)
class Work:
    """A command that takes a while.

    Attributes:
        words: Words behind `thoughtbubbles`; `{out}` stands for what it writes and `{here}` for a
            folder of the process's own.
        begun: Whether it is at what the kill should meet, by its folder and its output; the kill is
            drawn between this moment and the end of the process.
        same: Checks two outputs for equality.
        again: Whether the same command goes on after a kill, or refuses what is there.
        atomic: Whether each file that has its name is whole.
    """

    words: tuple[str, ...]
    begun: Callable[[Path, str], bool]
    same: Callable[[Path, Path], None]
    again: bool = True
    atomic: bool = False


def printed(words: str) -> Callable[[Path, str], bool]:
    return lambda here, text: words in text


def exists(pattern: str) -> Callable[[Path, str], bool]:
    return lambda here, text: any(here.glob(pattern))


def steps(count: int) -> Callable[[Path, str], bool]:
    def reached(here: Path, text: str) -> bool:
        file = here / "out/metrics.jsonl"
        return file.exists() and file.read_bytes().count(b"\n") >= count

    return reached


SAVED = {"save_every": "3", "log_every": "1"}
REINFORCED = options(RL, steps="9", max_new_tokens="4", **SAVED)
SEARCH = "deepsearch(width=2, step_len=1, probe=2, threshold=0.5)"
LINES = options(SAMPLED, pool="60", samples="8")
EASY = options(LINES, task="easy", max_new_tokens="64")
WORKS = {
    "sft": Work(
        (*options(SFT, steps="24", **SAVED), "--out", "{out}"), steps(1), same_run
    ),
    "rl": Work((*REINFORCED, "--out", "{out}"), steps(1), same_run),
    "search": Work(
        (*options(REINFORCED, method=SEARCH), "--out", "{out}"), steps(1), same_run
    ),
    "packing": Work(
        (*options(PRETRAIN, **{"data.corpus": "{base}/long", "data.cache-dir": "{here}/data"}),
         "--out", "{out}"),
        exists("data/*/*.partial"), same_run,
    ),
    "tokenizer": Work(
        words_of("tokenizer --corpus {base}/long --vocab-size 3000 --cache-dir {here}/data --out "
                 "{out}"),
        exists("data/corpora/*/documents.json"), same_bytes, atomic=True,
    ),
    "export": Work(
        words_of("export {base}/large --to {out}"), exists(".out.*/*"), same_bytes, again=False,
        atomic=True,
    ),
    "sae": Work(
        ("audit", "sae", *AUDITED, *words_of(
            "--tokens 4096 --batch-size 16 --rows 2 --buffer 32 --features 16 --k 2 --out {out}"
        )),
        printed("step "), same_arrays, again=False,
    ),
    "tuned lens": Work(
        ("audit", "tuned-lens", *AUDITED, *words_of("--steps 60 --batch-size 2 --out {out}")),
        printed("step "), same_arrays, again=False,
    ),
    "rejection": Work(
        ("rejection", "--plugin", "easy_task", *EASY, "--out", "{out}"),
        exists("out"), same_bytes, again=False,
    ),
    "probe": Work(("probe", *LINES, "--out", "{out}"), exists("out"), same_bytes),
    "demonstrations": Work(
        words_of(
            """demonstrations sokoban_variants --count 60 --out {out}/train.jsonl --battery
            {out}/battery --battery-count 20"""
        ),
        exists("out/train.jsonl"), same_bytes, again=False, atomic=True,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    preload()
    base = tmp_path_factory.mktemp("kills") / "base"
    make_base(base, base.parent / "made")
    config = ModelConfig(257, embed_dim=512, num_layers=6, num_heads=8)
    params = nnx.to_pure_dict(nnx.state(Thoughtbubbles(config, rngs=nnx.Rngs(0))))
    save_pretrained(base / "large", config, params, ByteTokenizer())  # 76 MB, which take a while
    (base / "long").mkdir()
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    for index in range(200):
        words = ("".join(rng.choices(letters, k=rng.randrange(2, 9))) for _ in range(3000))
        (base / f"long/{index}.txt").write_text(" ".join(words))
    yield base


def start(work: Work, base: Path, here: Path, cache: Path) -> Process:
    put = {"{base}": str(base), "{here}": str(here), "{out}": str(here / "out")}
    words = list(work.words)
    for name, value in put.items():
        words = [word.replace(name, value) for word in words]
    environment = os.environ | {"XLA_FLAGS": QUICK, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    return Process(["-c", PROGRAM, *words], environment, here)


@pytest.mark.experiment
@pytest.mark.parametrize("name", WORKS)
def test_a_kill_leaves_no_trace(name: str, base: Path, tmp_path: Path):
    work = WORKS[name]
    whole, killed, cache = tmp_path / "whole", tmp_path / "killed", tmp_path / "jax"
    cache.mkdir()
    for _ in range(2):  # the second one compiles nothing, as the killed one
        shutil.rmtree(whole, ignore_errors=True)
        process, seconds = start(work, base, whole, cache), 0.0
        while process.poll() is None:
            time.sleep(0.002)
            if not seconds and work.begun(whole, process.output()):
                seconds = time.monotonic()
        assert process.wait() == 0 and seconds, process.output()
        seconds = time.monotonic() - seconds
    moments = random.Random(time.time_ns())
    for turn in range(8):
        shutil.rmtree(killed, ignore_errors=True)
        process = start(work, base, killed, Path(shutil.copytree(cache, tmp_path / f"jax{turn}")))
        while process.poll() is None and not work.begun(killed, process.output()):
            time.sleep(0.002)
        moment = moments.uniform(0, seconds)
        time.sleep(moment)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            if process.wait() == -signal.SIGKILL:
                break
    else:
        pytest.fail(f"{name} ended before it was killed, eight times")
    left = sorted(str(path.relative_to(killed)) for path in killed.rglob("*"))
    print(f"\n{name}: killed {moment:.2f} s into {seconds:.2f} s of work", end=", ")
    print(f"left {len(left)}: {', '.join(left)[:300]}")
    out = killed / "out"
    if work.atomic and out.exists():
        assert content(out).items() <= content(whole / "out").items()
    if name == "rejection":  # each line is there when it is known
        assert (whole / "out").read_bytes().startswith(out.read_bytes())
    if not work.again and out.exists() and (out.is_file() or any(out.iterdir())):
        process = start(work, base, killed, cache)
        assert process.wait() == 2, process.output()
        [line] = process.output().strip().splitlines()
        assert line.startswith("error: "), line
        assert "exists" in line or "is there already" in line, line
        shutil.rmtree(out) if out.is_dir() else out.unlink()
    process = start(work, base, killed, cache)
    assert process.wait() == 0, process.output()
    work.same(out, whole / "out")
