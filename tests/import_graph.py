"""Who imports whom: `python tests/import_graph.py` prints the rooms by floor, and any circle."""

import ast
import functools
import graphlib
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("thoughtbubbles", "memgen", "train")
Graph = Mapping[str, set[str]]


def name_of(path: Path) -> str:
    """The dotted name of a module's file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def modules() -> dict[str, Path]:
    """All modules of the three packages by their dotted names."""
    files = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    return {name_of(path): path for path in files}


def imports_of(path: Path) -> set[str]:
    """Absolute dotted names that a file imports anywhere: lazily and for types alone too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.parent.relative_to(ROOT).parts
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            inner = {f"{module}.{alias.name}" for alias in node.names}
            names |= (inner & modules().keys()) or {module}
    return names


def module_graph() -> Graph:
    """Modules that each module imports."""
    known = modules()
    return {name: imports_of(path) & known.keys() - {name} for name, path in known.items()}


def room_of(module: str) -> str:
    """The package of a module; `train/*.py`, the commands, are a room of their own."""
    package = modules()[module].parent.relative_to(ROOT)
    if len(package.parts) < 2:
        return "train/*.py" if package.name == "train" else package.name
    return "/".join(package.parts[:2])


def room_graph(graph: Graph) -> Graph:
    """Rooms that each room imports from."""
    rooms: dict[str, set[str]] = {room_of(module): set() for module in graph}
    for module, imported in graph.items():
        rooms[room_of(module)] |= {room_of(other) for other in imported} - {room_of(module)}
    return rooms


def circle(graph: Graph) -> list[str]:
    """Members of one circle of imports, the first again at the end; empty where there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def floors(graph: Graph) -> dict[str, int]:
    """The floor of each room: 0 for those that import from none, else one above the highest."""
    found: dict[str, int] = {}
    for room in graphlib.TopologicalSorter(graph).static_order():
        found[room] = 1 + max((found[other] for other in graph[room]), default=-1)
    return found


def main() -> None:
    graph = module_graph()
    rooms = room_graph(graph)
    for name, part in (("modules", graph), ("rooms", rooms)):
        print(f"circle of {name}: {' -> '.join(circle(part)) or 'none'}")
    if circle(rooms):
        sys.exit(1)
    of_room: dict[str, list[int]] = {}
    for module, path in modules().items():
        of_room.setdefault(room_of(module), []).append(len(path.read_text().splitlines()))
    lines = [count for counts in of_room.values() for count in counts]
    print(
        f"{len(lines)} files, {max(lines)} lines at most, median {statistics.median_high(lines)}\n"
    )
    print("floor  files  lines  room                  imports from")
    for room, floor in sorted(floors(rooms).items(), key=lambda item: (-item[1], item[0])):
        below = " ".join(sorted(other.removeprefix("train/") for other in rooms[room]))
        counts = of_room[room]
        print(f"{floor:5}{len(counts):7}{sum(counts):7}  {room:20}  {below}")


if __name__ == "__main__":
    main()
