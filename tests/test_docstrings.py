"""Docstrings of the lower rooms: every argument, attribute and exception has a full sentence."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("train/data", "train/devices", "train/runs", "train/cli")
FILES = [path for room in ROOMS for path in sorted((ROOT / room).glob("*.py"))]
PARTIAL = {("attention.py", "resolve")}
"""Functions that describe only some of their arguments so far."""
LISTS = ("Args", "Attributes", "Raises")


def entries(docstring: str) -> Iterator[tuple[str, str]]:
    """Section and text of each entry, whose lines are joined; a section of prose is one entry."""
    section, text = "", ""
    for line in [*docstring.splitlines(), "end"]:
        if text and re.match(r" {0,4}\S" if section in LISTS else r"\S", line):
            yield section, text
            text = ""
        if heading := re.match(r"(\w+):$", line):
            section = heading[1]
        elif line and not line.startswith(" "):
            section = ""
        elif section:
            text = f"{text} {line.strip()}".strip()


def documented(tree: ast.Module) -> Iterator[tuple[str, str, set[str]]]:
    """Name, docstring and arguments of all functions and classes."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            arguments = {
                argument.arg
                for part in (node.body if isinstance(node, ast.ClassDef) else [node])
                if isinstance(part, ast.FunctionDef) and part.name in (node.name, "__init__")
                for argument in (*part.args.args, *part.args.kwonlyargs)
            }
            yield node.name, ast.get_docstring(node) or "", arguments - {"self"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_entries_are_sentences(path: Path):
    for name, docstring, arguments in documented(ast.parse(path.read_text())):
        described = set()
        for section, text in entries(docstring):
            names, _, sentence = text.partition(": ") if section in LISTS else ("", "", text)
            assert re.match(r'[A-Z"`].*\.$', sentence), f"{name}: {text}"
            described |= set(names.split(", ")) if section == "Args" else set()
        if described and (path.name, name) not in PARTIAL:
            assert arguments <= described, f"{name} does not describe {arguments - described}"
