"""Check that a figure can be saved before computing what it shows."""

import importlib.util
from pathlib import Path


def check_figure(path: Path) -> None:
    """Raise a ValueError if matplotlib or the folder is missing, or the suffix is unsupported.

    Args:
        path: Image file to write, with the suffix .png, .pdf or .svg.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('a figure needs matplotlib: pip install "thoughtbubbles[notebooks]"')
    if not path.absolute().parent.is_dir():
        raise ValueError(f"figure {path}: its folder does not exist, make it or choose another")
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"figure {path}: choose a name that ends in .png, .pdf or .svg")
