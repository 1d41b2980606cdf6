"""Experiments of docs/measured.md, each a command that gives its results again."""
