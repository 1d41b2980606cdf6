"""Errors that end a run although the command and the data are right."""


class RunFailed(RuntimeError):
    """A run can't continue; its command prints one line without traceback, and exits with 1."""
