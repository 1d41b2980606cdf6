"""Findings of an audit that is going on, on disk: one that was killed goes on from them."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from train.audit.organisms import Organism
from train.audit.rates import Finding
from train.data.json_lines import read_json_lines
from train.models.load import LanguageModel, checksum
from train.runs.files import write_atomically


class Unfinished:
    """Findings by organism and model, one JSON object on each line of a file.

    Args:
        path: File; it is made, with its folder, by the first finding.
        how: Options on which findings depend, as JSON can write them.

    Raises:
        ValueError: The file has findings of other options, or a line is none.
    """

    def __init__(self, path: Path, how: dict[str, Any]):
        self._path, self._how, self._lines = path, how, []
        if not path.exists():
            return
        for line in read_json_lines(path):
            fields = line.fields
            known = fields.get("how")
            if not isinstance(known, dict) or not {"of", "finding"} <= set(fields):
                raise ValueError(f"{line.where} is no finding: delete the file to begin anew")
            for name, value in how.items():
                if known.get(name) != value:
                    raise ValueError(
                        f"{path} is of an audit with {name}={known.get(name)}, not {value}, that "
                        "has not ended: ask for the same, delete the file, or choose another --out"
                    )
            self._lines.append(fields)

    def found(self, of: dict[str, str]) -> dict[str, Finding]:
        """Findings of an organism in a model, by method.

        Args:
            of: What `identity` says of both.
        """
        findings = (line["finding"] for line in self._lines if line["of"] == of)
        return {
            fields["method"]: Finding(
                fields["method"],
                tuple(fields["guesses"]),
                tuple(fields["hits"]),
                tuple(map(tuple, fields["shown"])),
            )
            for fields in findings
        }

    def add(self, of: dict[str, str], finding: Finding) -> None:
        """Write a finding to the file.

        Args:
            of: What `identity` says of organism and model.
            finding: What a method found.
        """
        line = {"of": of, "how": self._how, "finding": dataclasses.asdict(finding)}
        self._lines.append(line)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, "".join(json.dumps(each) + "\n" for each in self._lines))

    def delete(self) -> None:
        """Delete the file: the audit has ended."""
        self._path.unlink(missing_ok=True)


def identity(organism: Organism, lm: LanguageModel) -> dict[str, str]:
    """Hashes of what is asked, and of the weights that answer."""
    asked = hashlib.blake2b(organism.to_json().encode(), digest_size=16).hexdigest()
    return {"organism": asked, "weights": checksum(lm.memgen or lm.model)}
