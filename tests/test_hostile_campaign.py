"""The campaign: hostile options, files, templates and paths through the command line.

python -m pytest -m experiment --numprocesses=0 -s tests/test_hostile_campaign.py

HOSTILE_ONLY chooses cases by a pattern of their names; HOSTILE_REPORT names a file that
the reports are appended to.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import hostile_commands
import hostile_inputs
import hostile_options
import hostile_records
import pytest
from hostile_base import make_base
from hostile_runs import Case, preload, report, run_case, shown

KINDS = {
    "words": hostile_options.of_words,
    "records": hostile_records.of_records,
    "objects": hostile_options.of_objects,
    "malformed": hostile_options.of_malformed,
    "models": hostile_inputs.of_models,
    "gguf": hostile_inputs.of_gguf,
    "runs": hostile_records.of_runs,
    "templates": hostile_inputs.of_templates,
    "prompts": hostile_inputs.of_prompts,
    "corpora": hostile_inputs.of_corpora,
    "paths": hostile_inputs.of_paths,
    "damage": hostile_inputs.of_damage,
    "commands": hostile_commands.of_commands,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    preload()
    folder = tmp_path_factory.mktemp("hostile")
    make_base(folder / "base", folder / "made")
    yield folder / "base"


def test_every_command_is_in_the_campaign():
    assert set(hostile_commands.bases()) == set(hostile_commands.command_names())


@pytest.mark.experiment
@pytest.mark.parametrize("kind", KINDS)
def test_no_case_is_more_than_one_line(kind: str, base: Path, tmp_path: Path):
    cases: list[Case] = list(KINDS[kind]())
    assert len({case.name for case in cases}) == len(cases)
    only = re.compile(os.environ.get("HOSTILE_ONLY", ""))
    cases = [case for case in cases if only.search(case.name)]
    if not cases:
        pytest.skip("no case of this kind is chosen")
    outcomes = []
    for index, case in enumerate(cases):
        outcomes.append(run_case(case, base, tmp_path / str(index)))
        if fault := outcomes[-1].fault():
            print(f"\n{fault}\n    {shown(outcomes[-1])}", flush=True)
        shutil.rmtree(tmp_path / str(index), ignore_errors=True)
    text = report(outcomes)
    print(f"\n{kind}: {text}")
    if path := os.environ.get("HOSTILE_REPORT"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"\n{kind}: {text}\n")
    assert not [outcome for outcome in outcomes if outcome.fault()]
