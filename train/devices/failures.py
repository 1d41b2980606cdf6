"""Errors that end a run although its command and its data are right."""


class RunFailed(RuntimeError):
    """A run can't go on. Commands print the error in one line, without traceback, exit status 1."""
