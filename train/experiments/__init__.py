"""Experiments behind the numbers of docs/measured.md: each is a command that can be run again."""
