"""Experiments of docs/measured.md, each a command that reproduces its results."""
