"""BroRL: its theory to the printed digits, and what a run does with hundreds of rollouts."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rl_runs import Dies, job, rewards, timeless, trajectories

from train.engine.optim import OptimizerConfig
from train.experiments import broadening
from train.experiments.study import read_results
from train.rl.config import RLConfig
from train.rl.job import RLJob
from train.rl.learning.learner import Programs
from train.rl.learning.mass_balance import mass_balance, simulate, softmax, unsampled_mass
from train.rl.loop import train
from train.rl.methods import GRPO, BroRL
from train.rl.rollout.rows import make_rows
from train.rl.rollout.sampler import take_rows
from train.rl.types import Episodes
from train.runs.checkpoint import load_params
from train.runs.metrics import read_metrics

LOGITS = np.array([0.5, 0, -0.3, 1, 0.2, -0.5])
CORRECT = np.arange(6) < 3


def among(*indices: int) -> np.ndarray:
    return np.isin(np.arange(6), indices)


def test_mass_balance_to_the_digit():
    found = mass_balance(LOGITS, CORRECT, among(0, 3), rate=0.01)
    printed = [0.427123, -0.134777, 0.043164, 0.117331, 0.024594, 0.029530]
    np.testing.assert_allclose(found[:6], printed, atol=5e-7)
    np.testing.assert_allclose(found.terms, [2.806018e-2, 4.336035e-2, 1.989421e-4], rtol=5e-7)
    assert found.change == pytest.approx(7.161947e-4, rel=5e-7)


def test_mass_balance_is_the_derivative_along_the_surrogate():
    sampled, step = among(0, 3), 1e-4
    p = softmax(LOGITS)
    reward = np.where(CORRECT, 1.0, -1.0) * sampled
    moved = LOGITS + step * p * (reward - (reward * p).sum())
    change = (softmax(moved) - p)[CORRECT].sum() / step
    assert change == pytest.approx(7.161949e-2, rel=5e-7)
    assert mass_balance(LOGITS, CORRECT, sampled).change == pytest.approx(7.161947e-2, rel=5e-7)


def test_unsampled_correct_mass_can_hurt():
    logits = np.array([-2.0, 3, 0, -1, -1, -1])
    found = mass_balance(logits, CORRECT, among(0))
    np.testing.assert_allclose(found.terms, [1.806e-6, 0, -2.385e-4], rtol=5e-4)
    assert found.change == pytest.approx(-2.367e-4, rel=5e-4)
    with pytest.raises(ValueError, match=r"logits \(6,\), correct \(6,\) and sampled \(5,\)"):
        mass_balance(logits, CORRECT, np.ones(5, bool))


def test_unsampled_mass_to_the_digit():
    for p, count, printed in ((0.01, 16, 8.5146e-5), (0.01, 512, 5.8240e-7),
                              (0.1, 4, 6.561e-3), (0.1, 16, 1.853e-3)):  # fmt: skip
        assert unsampled_mass(p, count) == pytest.approx(printed, rel=5e-4)
    drawn = np.random.default_rng(0).random((100_000, 4)) < 0.1
    measured = 0.01 * (~drawn.any(axis=1)).mean()
    assert measured == pytest.approx(float(unsampled_mass(0.1, 4)), rel=0.02)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("study") / "broadening.jsonl"
    broadening.main(broadening.Broadening(out=str(out)))
    return read_results(out)


def test_more_rollouts_move_more_mass_and_lose_no_token(simulated):
    rows = {
        count: [r for r in simulated if r["rollouts"] == count] for count in (4, 16, 64, 512, 5120)
    }
    after = [np.mean([r["after"] for r in of_count]) for of_count in rows.values()]
    assert after == sorted(after)
    np.testing.assert_allclose(after, [0.631, 0.653, 0.674, 0.713, 0.734], atol=0.004)
    assert {round(r["before"], 3) for r in simulated} == {0.618}
    assert min(r["worst"] for r in rows[4]) < -1e-4
    assert min(r["worst"] for count in (512, 5120) for r in rows[count]) >= 0
    again = simulate(4, rows[4][0]["seed"])
    assert again.correct_mass[-1] == rows[4][0]["after"] and 0 < again.improved < 1


def test_the_study_has_a_table_and_a_figure(simulated):
    lines = broadening.report(simulated).splitlines()
    assert len(lines) == 7 and lines[2].startswith("| 4 | 0.618 ± 0.000 | 0.63")
    drawn = broadening.draw(simulated)
    assert [len(axes.lines) for axes in drawn.axes] == [5, 3, 3]
    terms = np.array([line.get_ydata() for line in drawn.axes[2].lines])
    assert abs(terms[2, 0]) > 1e-3 > 10 * abs(terms[2, -1]) and (terms[:2] >= 0).all()


def test_the_learning_rate_grows_by_the_square_root():
    """From 8192 to 65536 rollouts by a factor of 2.83; the config keeps what was written."""
    optimizer = OptimizerConfig(learning_rate=2e-6)
    method = BroRL(num_generations=512, base_rollouts=8192)
    config = RLConfig(method=method, batch_size=128, optimizer=optimizer)
    assert config.num_generations == 512 and config.rollouts == 65536
    assert config.scaled_optimizer.learning_rate == pytest.approx(5.657e-6, rel=1e-4)
    assert config.optimizer == optimizer
    few = RLConfig(method="brorl", num_generations=16, optimizer=optimizer)
    assert few.num_generations == 16 and few.scaled_optimizer == optimizer
    assert RLConfig(optimizer=optimizer).scaled_optimizer == optimizer
    assert RLConfig().num_generations == 8
    assert RLConfig(method=GRPO(num_generations=4)).num_generations == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "brorl(num_generations=64)", "num_generations": 32},
            "num_generations=32 of the run and 64 of method brorl: leave one of them out",
        ),
        ({"method": "brorl(base_rollouts=0)"}, "base_rollouts=0: choose 1 or more, or None"),
        ({"method": "grpo(reference_reset=0)"}, "reference_reset=0: choose 1 or more, or None"),
        (
            {"method": "grpo(reference_reset=5)"},
            "reference_reset=5 of method grpo is of the reference of a KL penalty, and the loss",
        ),
    ],
)
def test_mistakes_are_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        RLConfig(**changes)
    assert "\n" not in str(error.value)
    assert not RLConfig(method="brorl(kl=0.0)").parts.loss.uses_reference


@pytest.mark.parametrize(("problems", "count", "held"), [(512, 16, 512), (128, 512, 4096)])
def test_as_many_optimizer_steps_whatever_the_number_of_rollouts(tmp_path, problems, count, held):
    made = job(tmp_path, BroRL(kl=0.0), minibatches=16, batch_size=problems, num_generations=count)
    seen = []

    def step(state, rows):
        seen.append(int(rows["valid"].sum()))
        aux = {"tokens": np.float32(1)}
        return state, {"loss": 0.0, "grad_norm": 0.0, "learning_rate": 0.0, "aux": aux}

    zeros = lambda variables, rows: np.zeros(rows["tokens"].shape, np.float32)  # noqa: E731
    made.learner.programs = Programs(step, zeros)  # pyright: ignore[reportArgumentType]
    row = dataclasses.replace(trajectories([[1.0]])[0], group=0)
    rows = make_rows([row] * (problems * count), [np.zeros(1)] * (problems * count), 16)
    state: Any = type("State", (), {"variables": None})()
    made.learner.update(state, rows, np.random.default_rng(0))
    assert seen == [held] * 16


def collect(out: Path, max_rows: int) -> tuple[Any, int]:
    made = job(out, "grpo", num_generations=16, batch_size=2, max_rows=max_rows)
    sampler = made.sampler(made.first_state().variables)
    return made.collector.collect(sampler), sampler.prefills


@pytest.mark.experiment  # `python -m pytest -m experiment tests/test_rl_brorl.py`
def test_a_sub_batch_of_two_problems_has_a_prefill_of_its_own(tmp_path):
    assert collect(tmp_path, 3)[1] == 4, "twice where a sub-batch holds two problems"


def test_hundreds_of_rollouts_share_one_prefill(tmp_path):
    """Sub-batches of 4 rows; texts are those of one batch of all 32."""
    (together, once), (parts, shared) = (collect(tmp_path, rows) for rows in (32, 4))
    assert (once, shared) == (2, 2)
    assert [row.texts for row in parts.drawn] == [row.texts for row in together.drawn]
    for a, b in zip(parts.drawn, together.drawn, strict=True):
        np.testing.assert_allclose(a.log_probs, b.log_probs, rtol=1e-4, atol=1e-5)
    assert len(Episodes.from_trajectories(parts.drawn).rows) == 32


def test_rows_that_are_taken_share_no_buffer_with_what_is_kept():
    """Not even an array that all rows of a cache share: a session that responds is donated."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Shared:
        table: jax.Array

        def take_rows(self, policy, source, keys):
            return self

    kept = Shared(jax.numpy.arange(4))
    take_rows(None, kept, None, None).table.delete()
    assert kept.table.sum() == 6


def test_the_reference_policy_is_reset_and_kept_with_the_checkpoint(tmp_path: Path):
    """Reset after steps 2 and 4; the run that dies in step 4 goes on from step 3."""

    def run(out: Path, task: Any = None) -> RLJob:
        return job(out, BroRL(reference_reset=2), task, save_every=3)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    found = train(run(whole))
    divergence = [line["ref_kl"] for line in read_metrics(whole) if "ref_kl" in line]
    assert [value == 0 for value in divergence] == [True, False] * 3
    rates = [line["learning_rate"] for line in read_metrics(whole) if "learning_rate" in line]
    assert rates == pytest.approx([3e-2 * 0.5**0.5] * 6)
    with pytest.raises(KeyboardInterrupt):
        train(run(killed, Dies(killed)))
    assert len(rewards(killed)) == 3
    assert train(run(killed)) == found and timeless(killed) == timeless(whole)
    ours, theirs = (load_params(folder)[1] for folder in (killed, whole))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_run_says_its_learning_rate(tmp_path):
    made = job(tmp_path, "brorl(base_rollouts=128)")
    assert "brorl on vowels, 4 problems x 8 rollouts x 1 updates a step, learning rate 0.015;" in (
        made.describe()
    )
