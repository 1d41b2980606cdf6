"""Store of an unfinished audit's findings on disk, from which an interrupted audit resumes."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.audit.organisms import Organism
from train.audit.rates import Finding
from train.data.json_lines import read_json_lines
from train.runs.files import write_atomically

Subject = Mapping[str, str]
"""Subject of a finding: a mapping with the keys "model" (name of the model), "fingerprint" (hash of
the model) and "organism" (hash of the organism)."""


class UnfinishedAudit:
    """JSON Lines file of an audit's findings, from which an interrupted audit resumes.

    Args:
        path: Path of the file. If the file exists, its findings are read; otherwise the first new
            finding makes the file and its folder.
        options: JSON-serializable options that findings depend on.

    Raises:
        ValueError: The file was written by an audit with other options, or a line is not a finding.
    """

    def __init__(self, path: Path, options: Mapping[str, Any]):
        self._path, self._options = path, json.loads(json.dumps(options))
        self._lines: list[dict[str, Any]] = []
        for line in read_json_lines(path) if path.exists() else ():
            try:
                known, _, _ = line.fields["options"], line.fields["asked"], _finding(line.fields)
                differs = [name for name in self._options if known[name] != self._options[name]]
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"{line.where} is no finding: delete the file to begin anew"
                ) from error
            for name in differs:
                raise ValueError(
                    f"{path} is of an audit with {name}={known[name]}, not {self._options[name]}, "
                    "that has not ended: ask for the same, delete the file, or choose another --out"
                )
            self._lines.append(line.fields)

    def found(self, asked: Subject) -> dict[str, Finding]:
        """Return the stored findings of a model and an organism, keyed by the name of the method.

        Args:
            asked: Model and organism of the findings.
        """
        findings = (_finding(line) for line in self._lines if line["asked"] == asked)
        return {finding.method: finding for finding in findings}

    def add(self, asked: Subject, finding: Finding) -> None:
        """Add a finding to the file.

        Args:
            asked: Model and organism of the finding.
            finding: Finding of one method.
        """
        fields = dataclasses.asdict(finding)
        self._lines.append({"asked": dict(asked), "options": self._options, "finding": fields})
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in self._lines))

    def delete(self) -> None:
        """Delete the file, since the audit has ended."""
        self._path.unlink(missing_ok=True)


def _finding(line: Mapping[str, Any]) -> Finding:
    fields = line["finding"]
    shown = tuple(map(tuple, fields["shown"]))
    return Finding(fields["method"], tuple(fields["guesses"]), tuple(fields["hits"]), shown)


def organism_hash(organism: Organism) -> str:
    """Compute a hash of an organism's whole content, in hexadecimal."""
    return hashlib.blake2b(organism.to_json().encode(), digest_size=16).hexdigest()
