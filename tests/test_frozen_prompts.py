"""The experiment on frozen prompts: its data, its tables, and the claims of its results."""

from pathlib import Path

import numpy as np
import pytest

from train.experiments import frozen_prompts as study
from train.experiments.study import read_results

RESULTS = Path(__file__).resolve().parents[1] / "docs/results"
NAMES = list(study.TOKENS)
MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


def test_rows_are_prompts_with_their_own_names():
    batch = next(study.batches(study.ARMS["thoughts, diverse"], 0))
    words = [[NAMES[token] for token in row] for row in batch["tokens"]]
    assert batch["tokens"].shape == (study.BATCH, study.WIDTH)
    assert batch["loss_mask"].sum(axis=1).tolist() == [2] * study.BATCH
    for row in words:
        names = dict(zip(row[:8:2], row[1:8:2], strict=True))
        assert tuple(names) == study.DIRECTIONS and names[row[12]] == row[13]
        agent, target = np.array(row[8:10], int), np.array(row[10:12], int)
        after = agent + MOVES[row[12]]
        assert np.abs(target - after).sum() == np.abs(target - agent).sum() - 1 < study.NEAR
    frozen = next(study.batches(study.ARMS["frozen"], 0))["tokens"]
    assert len({tuple(row) for row in frozen[:, 1:8:2]}) == 1 and (frozen[:, 13] == -1).all()
    asked = next(study.lookups(0))["tokens"]
    assert all(row[list(row[:8:2]).index(row[8]) * 2 + 1] == row[9] for row in asked)


def test_test_prompts_are_what_they_are_called():
    sets = study.test_sets(0, 40)
    frozen = study.sampler(0, 1).map(0, 0)
    pool = set(study.sampler(0, None).training_pool)
    for name, examples in sets.items():
        for one in examples:
            shown = set(one.prompt.shown.answers)
            assert (one.scored is not one.prompt.shown) == (name == "fake")
            if name in ("held_out", "far", "fake"):
                assert not shown & pool
            elif name == "pool":
                assert shown <= pool
            else:
                assert shown == set(frozen.answers)
                assert (one.prompt.shown.answers == frozen.answers) == (name == "id")
    assert all(one.scored.answers == frozen.answers for one in sets["fake"])


def test_tables_have_means_over_seeds():
    tests = {name: {"success": 0.5, "validity": 1.0} for name in study.TESTS}
    runs = [{"arm": "K=2", "pretraining": 1, "steps": 9, "prompts": 4, "seed": seed,
             "scores": {"9": tests | {"id": {"success": seed / 2, "validity": 1.0}}}}
            for seed in (0, 1)]  # fmt: skip
    lines = study.report(runs).splitlines()
    assert lines[2].startswith("| K=2, step 9 | 0.25 ± 0.25 | 0.50 ± 0.00 |")
    assert lines[-1].endswith("| 1.00 ± 0.00 | 0 1 |")
    for name, note in (("pretraining", "(2 steps of pretraining, 4 prompts)"),
                       ("prompts", "(1 steps of pretraining, 2 prompts)")):  # fmt: skip
        lines = study.report([*runs, runs[0] | {name: 2}]).splitlines()
        assert lines[3].startswith(f"| K=2, step 9 {note} | 0.00") and lines[3].endswith("| 0 |")


@pytest.mark.parametrize("name", ["frozen_prompts", "frozen_prompts_2400"])
def test_results_on_file_show_the_frozen_prompt(name):
    runs = read_results(RESULTS / f"{name}.jsonl")
    last = lambda arm: [r["scores"][str(r["steps"])] for r in runs if r["arm"] == arm]  # noqa: E731
    for scores in last("frozen"):
        assert scores["held_out"]["validity"] < 0.5 and scores["fake"]["success"] > 0.3
    for scores in last("thoughts, diverse"):
        assert scores["fake"]["success"] < 0.1
        assert scores["held_out"]["success"] > 0.9 or name == "frozen_prompts"  # with more steps
    assert len(last("frozen")) == len(last("thoughts, diverse")) == 3
