"""What ends a run, though its command and its data are right."""


class RunFailed(RuntimeError):
    """A run that can't go on. Commands say so in one line, without a traceback, exit status 1."""
