"""The command line: options, errors of one line, figure files."""
