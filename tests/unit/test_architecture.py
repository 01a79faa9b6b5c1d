"""The rules of the architecture: layers, circles, sizes, and what the runtime may import.

python -m tests.unit.test_architecture      # prints the figures
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from tests.testing.paths import ROOT

# From the bottom up: a module imports its own layer and those before it. The longest prefix of a
# module's name says where it belongs.
LAYERS = (
    ("dlp_edge.errors", "dlp_edge.types", "dlp_edge.checks", "dlp_edge.native_calls"),
    ("dlp_edge.untrusted", "dlp_edge.onnx_bytes", "dlp_edge.atomic", "dlp_edge.tasks"),
    ("dlp_edge.bundle",),
    ("dlp_edge.hub",),
    ("dlp_edge.runtime.options", "dlp_edge.runtime.request", "dlp_edge.runtime.text"),
    ("dlp_edge.runtime.engine", "dlp_edge.runtime.memory"),
    ("dlp_edge.runtime.fusion", "dlp_edge.runtime.routing"),
    ("dlp_edge.runtime.decoding", "dlp_edge.runtime.adapters"),
    ("dlp_edge.runtime",),
    ("dlp_edge",),
    ("dlp_edge.models",),
    ("dlp_edge.export",),
    ("dlp_edge.evaluation", "dlp_edge.bench", "dlp_edge.server", "dlp_edge.demo"),
    ("dlp_edge.front",),
    ("dlp_edge.cli", "dlp_edge.freezing"),
)
LARGEST_FOLDER = 16
LONGEST_FILE = 350
HEAVY = ("torch", "transformers", "peft", "onnx", "bitsandbytes", "optimum", "gguf")
LEAN = [name for layer in LAYERS[:10] for name in layer if name != "dlp_edge"]


def sources() -> dict[str, Path]:
    """Module -> file, as the wheel has them: runtime/, models/ and export/ lie in dlp_edge/."""
    found = {}
    for folder in ("dlp_edge", "runtime", "models", "export"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if parts[0] == "dlp_edge" else ("dlp_edge", *parts)
            if parts[-1].startswith("hook-"):  # PyInstaller runs them
                continue
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports() -> dict[str, frozenset[str]]:
    """Module -> the modules of the project that it imports, also inside functions."""
    modules = sources()
    graph = {}
    for name, path in modules.items():
        wanted = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                below = {f"{node.module}.{alias.name}" for alias in node.names}
                wanted |= (below & modules.keys()) or {node.module}
        graph[name] = frozenset(wanted & modules.keys() - {name})
    return graph


def layer_of(module: str) -> int:
    """The number of a module's layer."""
    fitting = [
        (len(prefix), number)
        for number, layer in enumerate(LAYERS)
        for prefix in layer
        if module == prefix or module.startswith(f"{prefix}.")
    ]
    return max(fitting)[1]


def upward() -> list[str]:
    """Imports from a lower layer to a higher one. The package's own lazy names, which name what
    they hand on as text, do not count; nor does a version number."""
    return sorted(
        f"{name} -> {target}"
        for name, targets in imports().items()
        for target in targets
        if name != "dlp_edge" and target != "dlp_edge" and layer_of(target) > layer_of(name)
    )


def circles(graph: Mapping[str, frozenset[str]]) -> list[tuple[str, ...]]:
    """Groups of nodes that reach each other (Tarjan)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for target in graph[node]:
            if target not in order:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], order[target])
        if low[node] == order[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(tuple(sorted(group)))

    for node in graph:
        if node not in order:
            visit(node)
    return found


def without_root() -> dict[str, frozenset[str]]:
    """The imports without `dlp_edge/__init__.py`, whose names are lazy."""
    return {name: to - {"dlp_edge"} for name, to in imports().items() if name != "dlp_edge"}


def packages() -> dict[str, frozenset[str]]:
    """Package -> packages that it imports; a module beside packages counts as one of its own."""
    folders = {name.rpartition(".")[0] for name in imports()}

    def room(name: str) -> str:
        parent = name.rpartition(".")[0]
        holds_packages = any(folder.startswith(f"{parent}.") for folder in folders)
        return name if name in folders or holds_packages else parent

    graph: dict[str, set[str]] = defaultdict(set)
    for name, targets in without_root().items():
        graph[room(name)] |= {room(target) for target in targets} - {room(name)}
    return {name: frozenset(targets) for name, targets in graph.items()}


def folders() -> Counter[str]:
    """Files of code a folder, without `__init__.py`."""
    return Counter(
        path.parent.relative_to(ROOT).as_posix()
        for path in sources().values()
        if path.name != "__init__.py"
    )


def lengths() -> Iterator[tuple[int, str]]:
    """Lines of every file."""
    for path in sources().values():
        text = path.read_text(encoding="utf-8")
        yield text.count("\n"), path.relative_to(ROOT).as_posix()


def test_no_import_runs_upward() -> None:
    assert upward() == []


def test_no_module_and_no_package_is_in_a_circle() -> None:
    assert circles(without_root()) == []
    assert circles(packages()) == []


def test_a_circle_would_be_found() -> None:
    ring = {"a": frozenset("b"), "b": frozenset("c"), "c": frozenset("a"), "d": frozenset("a")}
    assert circles(ring) == [("a", "b", "c")]


def test_the_bundle_format_knows_no_runtime() -> None:
    below = LAYERS[0] + LAYERS[1] + LAYERS[2]
    for name, targets in imports().items():
        if name.startswith(below):
            assert not [target for target in targets if "dlp_edge.runtime" in target], name


def test_the_runtime_knows_neither_export_nor_models() -> None:
    for name, targets in imports().items():
        if name.startswith("dlp_edge.runtime"):
            wrong = [t for t in targets if t.startswith(("dlp_edge.export", "dlp_edge.models"))]
            assert not wrong, name


def test_the_lean_part_imports_nothing_heavy() -> None:
    lean = [name for name in sources() if name.startswith(tuple(LEAN))]
    lean = [name for name in lean if not name.startswith(("dlp_edge.export", "dlp_edge.models"))]
    code = (
        f"import importlib, sys\nfor name in {lean!r}: importlib.import_module(name)\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_folders_and_files_are_of_a_size_to_survey() -> None:
    assert [name for name, count in folders().items() if count > LARGEST_FOLDER] == []
    assert [file for lines, file in lengths() if lines > LONGEST_FILE] == []


def main() -> None:
    for name, count in folders().most_common():
        print(f"{count:3}  {name}/")
    lines, file = max(lengths())
    print(f"longest file: {file}, {lines} lines")
    print(f"imports that run upward: {len(upward())}", *upward(), sep="\n    ")
    rings = circles(without_root()) + circles(packages())
    print(f"circles: {len(rings)}", *rings, sep="\n    ")


if __name__ == "__main__":
    main()
