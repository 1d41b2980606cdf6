"""Metadata of a run that were edited, or that another version wrote: one line for all mistakes."""

import copy
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from tiny import SMALL

from memgen import LoRAConfig, MemGenConfig, TriggerConfig
from train.cli.config_json import as_json, from_json, model_from_json
from train.data import ByteTokenizer
from train.models import load
from train.pretraining.config import RunConfig
from train.runs import checksums
from train.runs.checkpoint import Checkpointer, CheckpointError, load_params
from train.runs.metadata import checked_meta
from train.runs.resume import noted_changes
from train.runs.run_folder import check_continuation

CONFIG = RunConfig(model=SMALL)
META: dict[str, Any] = {
    "config": as_json(CONFIG),
    "resolved": {"attention": "xla"},
    "data_fingerprint": "0",
    "tokenizer": ByteTokenizer().to_json(),
    "step": 3,
}
WRONG = [None, "x", 2.5, -1, True, [], [[]], {}, {"a": 1}, 10**30, "drop"]


def places(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every field of nested objects."""
    found = []
    for name, value in tree.items():
        found.append((*path, name))
        if isinstance(value, dict):
            found += places(value, (*path, name))
    return found


def changed(tree: Any, path: tuple[str, ...], value: Any) -> Any:
    tree = copy.deepcopy(tree)
    inside = tree
    for name in path[:-1]:
        inside = inside[name]
    if value == "drop":
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    return tree


def one_line(read: Any) -> bool:
    """Whether it is refused, which must be in one line."""
    try:
        read()
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 800, error
        return True
    return False


def test_a_resumed_run_says_what_was_edited():
    for path in places(META):
        for value in WRONG:
            meta = changed(META, path, value)

            def resume(meta: Any = meta) -> None:
                check_continuation(Path("run"), checked_meta(meta, "run"), CONFIG)
                noted_changes(meta, META, CONFIG)

            refused = one_line(resume)
            field = path[1] if path[0] == "config" and len(path) > 1 else ""
            if value == "drop" and (len(path) == 1 or field == "model"):
                # An option that is left out has its default in a model alone.
                assert refused or field == "model", (path, value)


def test_wrong_values_of_our_own_are_not_to_be_copied_again():
    for name, value in (("step", "3"), ("tokenizer", 5), ("config", [])):
        with pytest.raises(ValueError, match=f"{name}=.*: it was edited, or another version of"):
            checked_meta(META | {name: value}, "run")


def test_a_model_says_what_was_edited(monkeypatch: pytest.MonkeyPatch):
    def model_of(meta: dict[str, Any]) -> None:
        monkeypatch.setattr(load, "load_params", lambda *_: (meta, {}))
        load.load_model("run")

    model = META["config"]["model"]
    for path in [path for path in places(META) if path[:2] in {("config", "model"), path[:1]}]:
        for value in WRONG:
            assert one_line(lambda p=path, v=value: model_of(changed(META, p, v)))  # no params
    for name in model:
        if name in ("architecture", "rope_scaling"):
            continue
        for value in WRONG[1:-1]:
            edited = model | {name: value}
            if not one_line(lambda edited=edited: model_from_json(edited)):
                allowed = (type(model[name]), int, *([float] if name == "fork_gate" else []))
                assert type(value) in allowed or value == [], (name, value)
    with pytest.raises(ValueError, match="thoughtbubbles has no field 'newer': a newer version"):
        model_from_json(model | {"newer": 1})
    with pytest.raises(ValueError, match="lacks 'vocab_size', which this version needs"):
        model_from_json(changed(model, ("vocab_size",), "drop"))


@pytest.mark.parametrize("config", [LoRAConfig(), MemGenConfig(), TriggerConfig()])
def test_nested_configs_say_what_was_edited(config: Any):
    fields = json.loads(json.dumps(as_json(config)))
    assert from_json(type(config), fields, "it") == config
    for path in places(fields):
        for value in WRONG:
            one_line(lambda p=path, v=value: from_json(type(config), changed(fields, p, v), "it"))
    for value in WRONG[:-1]:
        if value != {}:
            assert one_line(lambda value=value: from_json(type(config), value, "it"))


def test_a_checkpoint_of_a_newer_version_names_what_it_has(tmp_path: Path):
    small = {"w": jnp.ones(3)}
    with Checkpointer(tmp_path, save_interval=1) as checkpointer:
        checkpointer.save(1, small, small, {"step": 1})
    file = tmp_path / "1" / "meta" / "metadata"
    written = json.loads(file.read_text())

    def read(content: str) -> Any:
        file.write_text(content)
        checksums.write(tmp_path / "1")  # as one who edits it on purpose
        return load_params(tmp_path)

    newer = written | {"format": 2, "layout": "new"}
    with pytest.raises(CheckpointError, match=r"has format 2, .* reads 1 \(.*: layout\): install"):
        read(json.dumps(newer))
    for path in [*places(written), ("leaves", "params", "w")]:
        for value in WRONG:
            if path[0] != "meta" or len(path) == 1:
                one_line(lambda p=path, v=value: read(json.dumps(changed(written, p, v))))
    for content in ("", "[]", "[" * 100_000, "\x00"):
        assert one_line(lambda content=content: read(content))
    older = {name: part for name, part in written.items() if name != "format"}
    assert read(json.dumps(older))[0] == read(json.dumps(written))[0] == {"step": 1}
