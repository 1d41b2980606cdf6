"""Values that hold arrays are shown by types and shapes, not by ten thousand numbers."""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest

import memgen
import thoughtbubbles
from memgen.analysis import Clusters, InvocationHistogram
from memgen.uncached import Rows
from thoughtbubbles.hatchling.state import Layers, Neurons

SCALARS = {"Sampling", "RandomInvoke", "LearnedInvoke"}
"""Classes whose arrays are single numbers."""


def classes(package: ModuleType) -> Iterator[type]:
    """Public dataclasses and NamedTuples with arrays among their fields."""
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(info.name)
        for name, kind in inspect.getmembers(module, inspect.isclass):
            own = kind.__module__ == info.name and not name.startswith("_")
            if own and (dataclasses.is_dataclass(kind) or hasattr(kind, "_fields")):
                types = [
                    str(t) for base in kind.__mro__ for t in inspect.get_annotations(base).values()
                ]
                if any("Array" in text or "ndarray" in text for text in types):
                    yield kind


@pytest.mark.parametrize("package", [thoughtbubbles, memgen])
def test_all_values_with_arrays_have_short_reprs(package: ModuleType):
    found = [kind for kind in classes(package) if kind.__name__ not in SCALARS]
    long = [k.__name__ for k in found if k.__repr__.__module__ != f"{package.__name__}.short_repr"]
    assert len(found) >= 15 and long == []


def test_tuples_and_what_they_hold_are_short():
    wide = np.zeros((3, 4), np.float32)
    layers = Layers(wide, wide, wide, Neurons(wide, wide, wide))
    shown = ", ".join(f"{name}=float32[3,4]" for name in ("value", "x_active", "y_active"))
    inner = ", ".join(f"{name}=float32[3,4]" for name in Neurons._fields)
    assert repr(layers) == f"Layers({shown}, watched=Neurons({inner}), carried=None)"
    histogram = InvocationHistogram(wide, {"a": wide}, {}, {"a": 2})
    assert repr(histogram).endswith("queried={'a': float32[3,4]}, invoked={}, rows={'a': 2})")
    clusters = Clusters(wide, wide, 0.5)
    assert repr(clusters).endswith("labels=float32[3,4], silhouette=0.5)")
    assert repr(Rows(wide, wide)) == "Rows(vectors=float32[3,4], length=float32[3,4])"  # type: ignore
