"""Experiments behind the claims of the README: each is a command that can be run again."""
