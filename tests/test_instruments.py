"""Time and memory of a run: stopwatch, MFU, profiler window."""

import os

import jax
import pytest
from processes import PATIENCE, Process

from train.devices.mesh import MeshConfig, make_mesh
from train.runs.instruments import Stopwatch, memory, parse_window, peak_flops


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(watch, clock, durations, wait=0.0):
    for seconds in durations:
        with watch.waiting():
            clock.now += wait
        clock.now += seconds - wait
        watch.step_done()


def test_steps_of_shorter_rows_count_for_their_share():
    clock = Clock()
    watch = Stopwatch(tokens=100, flops=4e9, peak_flops=1e10, clock=clock)
    for share in (1.0, 1.0, 0.25, 0.25):
        clock.now += 8.0 * share
        watch.step_done(share)
    assert watch.tokens_per_second == pytest.approx(100 * 1.5 / 12)
    assert watch.report()["mfu"] == pytest.approx(4e9 / 8 / 1e10)


def test_a_stopwatch_counts_steps_and_neither_the_first_nor_pauses():
    clock = Clock()
    watch = Stopwatch(tokens=50, flops=3e9, peak_flops=1e10, clock=clock)
    assert watch.report() == {} and watch.tokens_per_second is None
    run(watch, clock, [30.0])  # compiles
    assert watch.report() == {}
    run(watch, clock, [1.0, 1.0, 1.0, 5.0], wait=0.5)
    clock.now += 12.0  # an evaluation
    watch.resume()
    run(watch, clock, [2.0])
    report = watch.report()
    assert report["tokens_per_second"] == pytest.approx(250 / 10)
    assert report["step_seconds"] == pytest.approx(1.0)
    assert report["step_seconds_p90"] == pytest.approx(3.8)
    assert report["step_seconds_p99"] == pytest.approx(4.88)
    assert report["data_wait"] == pytest.approx(2 / 10)
    assert report["goodput"] == pytest.approx(10 / 52)
    assert report["mfu"] == pytest.approx(0.3)


def test_a_pause_after_every_step_hides_none():
    clock = Clock()
    watch = Stopwatch(tokens=1, flops=1, peak_flops=None, start_time=90.0, clock=clock)
    for _ in range(5):
        run(watch, clock, [1.0])
        clock.now += 0.25
        watch.resume()
    report = watch.report()
    assert report["step_seconds"] == pytest.approx(1.0)
    assert report["goodput"] == pytest.approx(4 / 16.25)


def test_rates_forget_what_is_older_than_the_window_and_goodput_does_not():
    clock = Clock()
    watch = Stopwatch(tokens=1, flops=1, peak_flops=None, window=2, clock=clock)
    run(watch, clock, [1.0, 9.0, 1.0, 3.0])
    report = watch.report()
    assert report["tokens_per_second"] == pytest.approx(2 / 4)
    assert report["goodput"] == pytest.approx(13 / 14)
    assert "mfu" not in report


def test_the_peak_is_known_by_the_kind_of_device_or_given():
    mesh = make_mesh(MeshConfig())
    assert peak_flops(mesh) is None  # CPUs
    assert peak_flops(mesh, 2.5) == 2.5e12 * mesh.size


def test_memory_of_the_host_is_told():
    assert 0.05 < memory()["memory/host_peak_gib"] < 100


PROFILED = """
import pathlib, sys, jax, jax.numpy as jnp
from train.runs.instruments import Profiler
folder = pathlib.Path(sys.argv[1])
with Profiler("steps=3:4", folder / "window") as profiler:
    for step in range(1, 7):
        with profiler.step(step):
            result = jnp.zeros(()) + step
        if profiler.ends_with(step):
            jax.block_until_ready(result)
            profiler.stop()
        assert profiler._on == (step == 3)
with Profiler("1:9", folder / "ended") as profiler, profiler.step(1):
    jax.block_until_ready(jnp.ones(()) * 2)
"""


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """Traces of a process with few programs: all that a process holds are written into them."""
    folder = tmp_path_factory.mktemp("profiled")
    process = Process(("-c", PROFILED, folder), os.environ, folder)
    assert process.wait(timeout=PATIENCE) == 0, process.output()
    return folder


def test_the_profiler_records_its_window_and_nothing_else(profiled):
    [trace] = (profiled / "window").rglob("*.xplane.pb")
    events = [
        dict(event.stats)
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    ]
    assert {event["step_num"] for event in events} == {3, 4}


def test_a_run_that_ends_within_the_window_keeps_the_trace(profiled):
    assert list((profiled / "ended").rglob("*.xplane.pb"))


@pytest.mark.parametrize("text", ["10", "5:3", "0:3", "a:b", "steps=", "1:2:3"])
def test_a_window_that_is_none_is_told(text):
    with pytest.raises(ValueError, match="first and the last step, such as 10:20"):
        parse_window(text)
