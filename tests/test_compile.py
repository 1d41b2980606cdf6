"""The compile and fit report: programs for chips that aren't there."""

import dataclasses
import importlib.util
import json
import math
import os

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from processes import PATIENCE, Process

from thoughtbubbles import ModelConfig, TopK
from train import compile as command
from train.aot import fitting
from train.aot.config import CompileConfig, presets
from train.aot.fitting import fit, needed_memory, remedies
from train.aot.hlo import collectives_of
from train.aot.program import program_of
from train.aot.report import arguments_of, report_of, text_of
from train.aot.topology import link_bandwidth, topology_of
from train.compile import as_options
from train.data import DataConfig
from train.devices.hardware import CHIPS, GIB, chip_of
from train.devices.mesh import BATCH_AXES, MeshConfig, make_mesh

# Programs for chips that aren't here are cached, and can't be read back.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='needs libtpu: pip install -e ".[tpu]"'
)
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason='needs the CUDA plugin: pip install -e ".[cuda]"',
)
ROWS, TOKENS, SLOTS, WIDTH = 24, 40, 80, 128  # no parameter has an axis of 24, 40 or 80
CONFIG = CompileConfig(
    model=ModelConfig(
        vocab_size=256,
        embed_dim=WIDTH,
        num_layers=2,
        num_heads=2,
        fork_layers=(1,),
        dtype="bfloat16",
    ),
    data=DataConfig(seq_len=TOKENS),
    batch_size=ROWS,
    mesh=MeshConfig(data=2, fsdp=4),
    topology="v5e:2x4",
    attention="xla",
)


# --- reading compiled programs ---

LOOP = """HloModule jit_step

%body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %g = (bf16[2,16]{1,0}, bf16[8,16]{1,0:T(8,128)(2,1)}) all-gather-start(%w), channel_id=1, replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}, metadata={op_name="jit(step)/while/dot"}
  %d = bf16[8,16]{1,0} all-gather-done(%g)
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  ROOT %t = (s32[], bf16[8,16]) tuple(%next, %d)
}

%cond (p: (s32[], bf16[8,16])) -> pred[] {
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} constant(56)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%all-reduce-scatter.3 (p: f32[64]) -> f32[16] {
  %r = f32[64]{0} all-reduce(%p), channel_id=5, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %s = f32[16]{0} dynamic-slice(%r, %i), dynamic_slice_sizes={16}
}

%part.1 (p: bf16[4]) -> bf16[8] {
  ROOT %a = bf16[8]{0} all-gather(%p), channel_id=9, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
}

%part.2 (p: bf16[4]) -> bf16[8] {
  ROOT %a = bf16[8]{0} all-gather(%p), channel_id=9, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
}

ENTRY %main (p: bf16[8,16]) -> bf16[8,16] {
  %w = (s32[], bf16[8,16]) while(%p), condition=%cond, body=%body
  %c = (s32[], bf16[8,16]) while(%p), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %f = f32[16]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3
  %x = bf16[8]{0} fusion(%p), kind=kLoop, calls=%part.1
  %y = bf16[8]{0} fusion(%p), kind=kLoop, calls=%part.2
  %e = (f32[4], s32[2]) reduce-scatter(%p, %p), channel_id=11, replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
  %q = f32[6]{0} collective-permute(%p), channel_id=12, source_target_pairs={{0,0},{1,3},{3,1}}
  ROOT %o = bf16[8,16] copy(%p)
}
"""  # noqa: E501


def test_collectives_are_counted_with_the_loops_around_them():
    found = collectives_of(LOOP, 8)
    gather, scatter, spread, both, permute = found.items
    assert (gather.kind, gather.times, gather.size) == ("all-gather", 28 + 3, 8 * 16 * 2)
    assert gather.group == (0, 2, 4, 6) and gather.op_name == "jit(step)/while/dot"
    assert gather.received == 8 * 16 * 2 * 3 / 4
    assert (scatter.kind, scatter.size, scatter.group) == ("reduce-scatter", 256, (0, 1, 2, 3))
    assert (spread.kind, spread.times, spread.group) == ("all-gather", 1, (0, 4))
    assert (both.size, both.group) == (4 * (4 * 4 + 2 * 4), (0, 1, 2, 3))
    assert (permute.group, permute.received) == ((1, 3), 24)
    assert found.unknown_loops == 0
    unbounded = LOOP.replace("constant(56)", "parameter(56)")
    assert collectives_of(unbounded, 8).items[0].times == 1 + 3
    assert collectives_of(unbounded, 8).unknown_loops == 1


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("mesh['a'=4,'b'=2] {'a'}", (0, 2, 4, 6)),
        ("mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}", (0, 2)),
        ("mesh['a'=8] {'a':(2)2}", (0, 2)),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
        ("[2,4]<=[2,2,2]T(2,1,0)", (0, 4, 2, 6)),
        ("{}", (0, 1, 2, 3, 4, 5, 6, 7)),
    ],
)
def test_groups_are_read_in_every_form(text, group):
    line = f"  %r = f32[8] all-reduce(%p), replica_groups={text}"
    [collective] = collectives_of(f"ENTRY %m (p: f32[8]) -> f32[8] {{\n{line}\n}}", 8).items
    assert collective.group == group


def test_counts_of_a_program_that_runs_here():
    """A scan of five products, each of a gathered matrix, on the simulated devices."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    rows, split = (NamedSharding(mesh, spec) for spec in (P(BATCH_AXES), P(None, "fsdp")))

    def chain(x, weights):
        product = lambda x, w: (jax.lax.with_sharding_constraint(x @ w, rows), None)  # noqa: E731
        return jax.lax.scan(product, x, weights)[0]

    x = jax.ShapeDtypeStruct((4096, 64), jnp.float32, sharding=rows)
    weights = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=split)
    compiled = jax.jit(chain).lower(x, weights).compile()
    [gather] = collectives_of(compiled.as_text(), 8).items
    assert (gather.kind, gather.times, gather.size) == ("all-gather", 5, 64 * 64 * 4)
    assert len(gather.group) == 8


# --- topologies ---


@dataclasses.dataclass(frozen=True)
class Place:
    coords: tuple[int, ...] = ()
    process_index: int = 0


def test_links_of_a_group():
    torus = [Place((x, y, z)) for x in range(4) for y in range(4) for z in range(4)]
    v5p, h100 = CHIPS["v5p"], CHIPS["h100"]
    assert link_bandwidth(v5p, torus, range(4)) == v5p.link
    assert link_bandwidth(v5p, torus, range(16)) == 2 * v5p.link
    assert link_bandwidth(v5p, torus, range(64)) == 3 * v5p.link
    hosts = [Place(process_index=device // 8) for device in range(16)]
    assert link_bandwidth(h100, hosts, range(8)) == h100.link
    assert link_bandwidth(h100, hosts, (0, 8)) == h100.network
    assert link_bandwidth(h100, hosts, range(16)) == 8 * h100.network


def test_chips_are_found_by_the_kind_that_jax_reports():
    assert chip_of("TPU v5 lite") is CHIPS["v5e"]
    assert chip_of("NVIDIA H100 80GB HBM3") is CHIPS["h100"]
    assert chip_of("cpu") is None
    kinds = [kind for chip in CHIPS.values() for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", r"unknown topology 'v9:2x2': choose one of v5e:2x2, .*v5p:4x4x4.*h100:16"),
        ("v5p", r"unknown topology 'v5p': choose one of v5p:2x2x1, .*v5p:4x4x4"),
        ("v5e:2x2x2", r"unknown topology 'v5e:2x2x2': choose one of v5e:2x2,"),
        ("h100:12", r"'h100:12': choose up to 8 GPUs, or a multiple of 8, such as h100:16"),
    ],
)
def test_unknown_topologies_are_told_the_known(name, message):
    with pytest.raises(ValueError, match=message):
        topology_of(name)


@needs_libtpu
def test_a_slice_that_the_compiler_does_not_know():
    with pytest.raises(ValueError, match="unknown topology 'v5e:3x3': choose one of v5e:2x2"):
        topology_of("v5e:3x3")


@pytest.mark.parametrize(("name", "extra"), [("v5e:2x4", "tpu"), ("h100:8", "cuda")])
def test_a_missing_compiler_names_the_extra(name, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ValueError, match=rf"not installed: pip install -e \"\.\[{extra}\]\""):
        topology_of(name)


# --- the report ---


@pytest.fixture(scope="module")
def topology():
    return topology_of("v5e:2x4")


@pytest.fixture(scope="module")
def compiled(topology):
    """The train step of `CONFIG`, its program and its report."""
    mesh = make_mesh(CONFIG.mesh, topology.devices)
    program = program_of(CONFIG, mesh, "step", "xla")
    executable = program.lower(topology.platform).compile()
    report = report_of(executable, program, topology, mesh)
    return executable, program, json.loads(json.dumps(report))


def moved_hidden_states(text: str) -> list:
    """Collectives on float arrays of a row or more, but for the lookup of embeddings.

    Of all axes only those over tokens and slots are multiples of 5, however they are reshaped.
    """
    return [
        item
        for item in collectives_of(text, 8).items
        if item.kind != "all-to-all" and any(map(is_hidden_state, item.shapes))
    ]


def is_hidden_state(shape: str) -> bool:
    kind, _, sizes = shape.strip("]").partition("[")
    elements = math.prod(int(size) for size in sizes.split(",") if size)
    return kind in ("f32", "bf16") and elements >= TOKENS * WIDTH and elements % 5 == 0


@pytest.mark.slow
@needs_libtpu
def test_fork_layers_move_no_hidden_states_between_chips(compiled):
    executable, _, _ = compiled
    assert len(collectives_of(executable.as_text(), 8).items) > 5, "it is a program on a mesh"
    assert moved_hidden_states(executable.as_text()) == []


@needs_libtpu
def test_that_test_sees_a_gather_over_the_whole_batch(topology):
    """The fork that must not be: an index that mixes rows, so that each chip needs all of them."""
    mesh = make_mesh(CONFIG.mesh, topology.devices)
    rows = NamedSharding(mesh, P(BATCH_AXES))
    x = jax.ShapeDtypeStruct((ROWS, TOKENS, WIDTH), jnp.bfloat16, sharding=rows)
    index = jax.ShapeDtypeStruct((ROWS, SLOTS), jnp.int32, sharding=rows)

    def fork(x, index):
        place = jnp.arange(ROWS)[:, None] * TOKENS + index
        return x.reshape(-1, WIDTH)[place]

    text = jax.jit(fork, out_shardings=rows).lower(x, index).compile().as_text()
    [gather] = moved_hidden_states(text)
    assert gather.kind == "all-gather" and gather.shapes == (f"bf16[{ROWS * TOKENS},{WIDTH}]",)


@pytest.mark.slow
@needs_libtpu
def test_report_of_a_train_step(compiled):
    executable, program, report = compiled
    memory, params = report["memory"], CONFIG.model.num_params()
    # Four bytes each, split over fsdp = 4, but for some biases; the optimizer holds two moments.
    assert params <= memory["parameters"] < 1.02 * params
    assert memory["optimizer state"] == 2 * memory["parameters"] + 3 * 4  # counters
    assert memory["batch"] == ROWS * (TOKENS + 1) * 4 / 8
    assert arguments_of(program)["parameters"] == memory["parameters"]
    stats = executable.memory_analysis()
    parts = [size for name, size in memory.items() if name not in ("peak", "available")]
    assert memory["peak"] == sum(parts)
    assert memory["peak"] == stats.peak_memory_in_bytes + stats.generated_code_size_in_bytes
    assert 0 < memory["temporaries"] <= stats.temp_size_in_bytes
    assert report["fits"] and memory["available"] == 15.75 * GIB

    kinds = report["collectives"]["kinds"]
    whole = 2 * params  # in bfloat16
    assert kinds["all-gather"]["bytes"] > 0.9 * whole, "fsdp gathers parameters"
    assert report["collectives"]["loops_of_unknown_length"] == 0
    assert report["flops"]["model"] == 3 * ROWS * CONFIG.model.forward_flops(TOKENS)
    roofline = report["roofline"]
    assert roofline["step"] == max(roofline[name] for name in ("compute", "HBM", "links"))
    assert roofline["compute"] == report["flops"]["model"] / 8 / 197e12
    rows = {row["name"]: row for row in report["sharding"]}
    assert rows["blocks/mlp/up"]["shape"] == [2, 128, 512]
    assert rows["blocks/mlp/up"]["per_device"] == [2, 32, 512]
    assert rows["blocks/mlp/up"]["spec"] == [None, "fsdp", "tensor"]

    text = text_of(report)
    assert text.startswith("fits: 0.0")
    assert all(words in text for words in ("optimizer state", "all-gather", "forks/0/score"))


@pytest.mark.slow
@needs_libtpu
def test_report_of_a_decode_step(topology):
    heads = dataclasses.replace(CONFIG, what="decode", mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    report = fit(heads, topology)
    memory, rows = report["memory"], {row["name"]: row for row in report["sharding"]}
    keys = 2 * ROWS * WIDTH * (TOKENS + SLOTS) * 2  # keys and values of one block each
    assert keys / 8 < memory["cache"] < 1.2 * keys / 8
    assert rows["blocks/mlp/up"]["spec"] == [None, None, "tensor"]
    assert rows["blocks/mlp/up"]["per_device"] == [2, 128, 256]
    assert report["fits"] and "optimizer state" not in memory


@pytest.mark.slow
@needs_cuda
def test_report_for_gpus():
    config = dataclasses.replace(CONFIG, topology="h100:8", attention="auto")
    report = fit(config, topology_of("h100:8"))
    assert report["memory"]["optimizer state"] == 2 * report["memory"]["parameters"] + 12
    parts = [size for name, size in report["memory"].items() if name not in ("peak", "available")]
    assert report["memory"]["peak"] == sum(parts)
    assert report["fits"] and report["memory"]["available"] == round(79.1 * GIB)
    assert {"all-gather", "reduce-scatter"} <= set(report["collectives"]["kinds"])


# --- what does not fit ---


def test_needed_memory_is_read_from_the_compiler():
    told = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (18.25G) exceeds available HBM (15.75G)."
    )
    assert needed_memory(told) == 18.25 * GIB
    other = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 2.5T of 95.74G hbm."
    assert needed_memory(other) == 2.5 * 1024 * GIB
    vmem = "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 19.52M of 16.00M vmem."
    assert needed_memory(vmem) is None
    assert needed_memory("INVALID_ARGUMENT: no") is None


def test_full_remat_computes_the_forward_pass_again():
    plain = ModelConfig(64, 32, num_layers=4, num_heads=2, remat="full")
    logits = 2 * 128 * plain.embed_dim * plain.vocab_size
    assert plain.recomputed_flops(128) == plain.forward_flops(128) - logits
    assert dataclasses.replace(plain, remat="dots").recomputed_flops(128) == 0
    without = dataclasses.replace(plain, nope_layers=(3,))
    assert without.recomputed_flops(128) == plain.recomputed_flops(128)
    copies = dataclasses.replace(plain, copies=3, merge="rightmost")
    assert copies.recomputed_flops(128) < copies.forward_flops(128)


@needs_libtpu
def test_the_compiler_still_says_it_that_way(topology):
    mesh = make_mesh(MeshConfig(), topology.devices)
    x = jax.ShapeDtypeStruct((5 * GIB,), jnp.float32, sharding=NamedSharding(mesh, P()))
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        jax.jit(jnp.sin).lower(x).compile()
    assert needed_memory(str(raised.value)) == 40 * GIB


def test_remedies_begin_with_what_costs_least():
    config = dataclasses.replace(CONFIG, mesh=MeshConfig())
    found = [options for options, _ in remedies(config, 8)]
    assert found[:3] == [
        "--model.remat dots",
        "--model.remat full",
        "--mesh.data 1 --mesh.fsdp 8 --mesh.tensor 1",
    ]
    assert found[-1] == "--mesh.data 1 --mesh.fsdp 1 --mesh.tensor 8 --model.remat full"
    for options, changed in remedies(config, 8):
        assert ("remat full" in options) == (changed.model.remat == "full")
        make_mesh(changed.mesh)


@pytest.fixture
def settings():
    """The command changes settings of jax for its process."""
    before = {
        name: getattr(jax.config, name)
        for name in ("jax_platforms", "jax_enable_compilation_cache")
    }
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def pretend(monkeypatch, needs):
    """In place of compiling: what a program needs by its remat policy; returns what was asked."""
    asked = []

    def pretended(config, topology):
        asked.append((config.model.remat, config.mesh.tensor))
        needed, available = needs[config.model.remat], round(topology.chip.memory)
        memory = {"needed": needed, "peak": needed, "available": available}
        return {"fits": needed <= available, "memory": memory}

    monkeypatch.setattr(fitting, "fit", pretended)
    return asked


def test_a_report_that_can_not_be_written_is_found_before_the_work(tmp_path):
    with pytest.raises(ValueError, match=r"none/report.json can't be written"):
        command.main(dataclasses.replace(CONFIG, json=str(tmp_path / "none/report.json")))


@needs_libtpu
def test_out_of_memory_is_an_answer(monkeypatch, capsys, tmp_path, settings):
    asked = pretend(monkeypatch, {"none": 20 * GIB, "dots": 16 * GIB, "full": 12 * GIB})
    path = tmp_path / "report.json"
    with pytest.raises(SystemExit) as left:
        command.main(dataclasses.replace(CONFIG, json=str(path)))
    assert left.value.code == 1
    assert asked == [("none", 1), ("dots", 1), ("full", 1)]
    out = capsys.readouterr().out
    assert "does not fit: 20.00 GiB of 15.75 GiB, 4.25 GiB too much" in out
    assert "fits with --model.remat full: 12.00 GiB" in out
    assert json.loads(path.read_text())["advice"]["options"] == "--model.remat full"


@needs_libtpu
def test_what_can_not_help_is_not_compiled(monkeypatch, capsys, settings):
    """A small state need not be split further; parts of 12 rows and half heads don't divide."""
    asked = pretend(monkeypatch, dict.fromkeys(("none", "dots", "full"), 20 * GIB))
    with pytest.raises(SystemExit):
        command.main(CONFIG)
    assert asked == [("none", 1), ("dots", 1), ("full", 1), ("full", 2)]
    assert "nothing tried fits" in capsys.readouterr().out


# --- mistakes and spellings ---


def test_the_short_spellings():
    words = "--preset 1_9b --topology v5p:4x4x4 --mesh data=1 fsdp=64 tensor=1 --steps 9"
    given = "1_9b --topology v5p:4x4x4 --mesh.data 1 --mesh.fsdp 64 --mesh.tensor 1 --steps 9"
    assert " ".join(as_options(words.split())) == given
    assert as_options(["tiny", "--mesh.data", "2"]) == ["tiny", "--mesh.data", "2"]


def test_every_run_can_be_asked_for():
    assert {"tiny", "150m", "319m", "772m", "1_9b"} <= set(presets())


@needs_libtpu
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": MeshConfig(3)}, "mesh data=3 fsdp=1 tensor=1 does not fit 8 devices"),
        ({"mesh": MeshConfig(1, 2, 4)}, "heads=2 does not divide over tensor=4"),
        ({"batch_size": 12}, "batch_size=12 does not divide .* choose a multiple of 8"),
        ({"what": "decode", "policy": TopK(2.0)}, r'pass --model.policy "PrefixRank'),
    ],
    ids=str,
)
def test_mistakes_are_one_line(changes, message, topology):
    changes = dict(changes)
    policy = changes.pop("policy", CONFIG.model.policy)
    model = dataclasses.replace(CONFIG.model, policy=policy)
    with pytest.raises(ValueError, match=message) as raised:
        fit(dataclasses.replace(CONFIG, model=model, **changes), topology)
    assert "\n" not in str(raised.value)


def test_the_command_exits_with_2_and_one_line(tmp_path):
    words = ("-m", "train.compile", "--preset", "tiny", "--topology", "v7:2x2")
    process = Process(words, os.environ, tmp_path)
    assert process.wait(timeout=PATIENCE) == 2
    assert process.output().startswith("error: unknown topology 'v7:2x2': choose one of")
    assert process.output().count("\n") == 1
