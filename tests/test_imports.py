"""The layers of DESIGN: imports run one way, no modules form a cycle, and `--help` stays instant.

Read from the sources; nothing is imported. Layers come from the folders, and an import counts
wherever in a file it stands.
"""

import ast
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = (
    {"__init__", "errors"},
    {"progress", "distributed"},
    {"storage"},
    {"artefacts"},
    {"donors"},
    {"models"},
    {"splicing"},
    STAGES := {"analysis", "planning", "merging", "evaluation", "reporting"},
    {"healing"},
    {"workflows"},
    {"api", "cli"},
    {"__main__"},
)
"""The folders and modules directly in the package, from the bottom up."""

HEAVY = ("torch", "transformers", "accelerate", "safetensors.torch")
MAY_BE_HEAVY = (
    "models.blank",
    "models.hooks",
    "models.images",
    "models.loading",
    "models.passes",
    "models.rates",
    "models.quiet",
    "models.sampling",
    "models.streaming",
    "models.teaching",
    "splicing.assemble",
    "splicing.at_home",
    "splicing.gauge_fitting",
    "splicing.gauge_refining",
    "splicing.surroundings",
    *(
        f"splicing.methods.{name}"
        for name in ("combine", "torch_span", "torch_sparse", "torch_select", "fusion")
    ),
    "analysis",
    "evaluation",
    *(f"healing.{name}" for name in ("adapters", "objective", "state", "tokens", "training")),
    "workflows",
)
"""Modules and folders that may import these at module level; all others do so inside functions."""


class Import(NamedTuple):
    path: Path
    """Within the repository."""
    line: int
    name: str
    """Dotted: a module, or a name imported from one."""
    at_once: bool
    """Whether it runs when the file is imported: not in a function, not for type checkers alone."""
    typing: bool
    """Whether it is for type checkers alone."""

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: imports {self.name}"


def part_of(dotted: str) -> str:
    """`splicing` of `frankenmerge.splicing.resolve`; `__init__` of the package itself."""
    parts = dotted.split(".")
    known = set().union(*LAYERS)
    return parts[1] if len(parts) > 1 and parts[1] in known else "__init__"


def layer_of(part: str) -> int:
    return next(number for number, parts in enumerate(LAYERS) if part in parts)


def module_of(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imports_of(path: Path, source: str) -> Iterator[Import]:
    for node, at_once, typing in _statements(ast.parse(source), True, False):
        if isinstance(node, ast.Import):
            prefix = []
        else:
            above = path.parent.parts[: len(path.parent.parts) + 1 - node.level]
            prefix = [*(above if node.level else ()), *filter(None, [node.module])]
        for alias in node.names:
            yield Import(path, node.lineno, ".".join([*prefix, alias.name]), at_once, typing)


def _statements(node: ast.AST, at_once: bool, typing: bool) -> Iterator[tuple]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, at_once, typing
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        checked = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
        yield from _statements(child, at_once and not function and not checked, typing or checked)


def against_direction(found: Import) -> str | None:
    if not f"{found.name}.".startswith("frankenmerge."):
        return None
    importer, imported = part_of(module_of(found.path)), part_of(found.name)
    upward = layer_of(imported) > layer_of(importer)
    sideways = {importer, imported} <= STAGES and importer != imported
    return f"{found}: {importer} may not import {imported}" if upward or sideways else None


def is_heavy(module: str) -> bool:
    return any(f"{module}.".startswith(f"{heavy}.") for heavy in MAY_BE_HEAVY)


def against_lightness(found: Import) -> str | None:
    if is_heavy(module_of(found.path).removeprefix("frankenmerge.")) or not found.at_once:
        return None
    if any(f"{found.name}.".startswith(f"{heavy}.") for heavy in HEAVY):
        return f"{found} at module level, which makes `--help` slow; import it in the function"
    if found.name.startswith("frankenmerge.") and is_heavy(
        found.name.removeprefix("frankenmerge.")
    ):
        return f"{found} at module level, which may import torch; import it in the function"
    return None


def files() -> list[Path]:
    return [path.relative_to(ROOT) for path in sorted((ROOT / "frankenmerge").rglob("*.py"))]


def imports() -> list[Import]:
    return [
        found
        for path in files()
        for found in imports_of(path, (ROOT / path).read_text(encoding="utf-8"))
    ]


def cycle_of(found: Iterable[Import], modules: set[str]) -> list[str]:
    """The modules of a cycle, empty where there is none; imports for type checkers do not count."""
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for each in found:
        name = each.name if each.name in modules else each.name.rpartition(".")[0]
        if name in modules and name != module_of(each.path) and not each.typing:
            graph[module_of(each.path)].add(name)
    graph = {module: used - {"frankenmerge"} for module, used in graph.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("rule", [against_direction, against_lightness])
def test_package_keeps_the_rule(rule):
    found = imports()
    assert len(found) > 500
    broken = [fault for each in found if (fault := rule(each))]
    assert not broken, "\n" + "\n".join(broken)


def test_no_modules_form_a_cycle():
    assert cycle_of(imports(), {module_of(path) for path in files()}) == []


def test_a_cycle_is_found():
    pairs = [("a", "b"), ("b", "c"), ("c", "a")]
    found = [Import(Path(f"p/{x}.py"), 1, f"p.{y}.name", False, False) for x, y in pairs]
    assert len(cycle_of(found, {"p.a", "p.b", "p.c"})) == 4
    assert cycle_of([each._replace(typing=True) for each in found], {"p.a", "p.b", "p.c"}) == []


def test_every_folder_and_module_has_a_layer():
    parts = {path.parts[1].removesuffix(".py") for path in files()}
    assert parts == set().union(*LAYERS)


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("cli/demo.py", "from frankenmerge.planning.plan import plan", False),
        ("workflows/plans.py", "import frankenmerge.analysis.align", False),
        ("planning/plan.py", "from .search import Constraints", False),
        ("artefacts/recipe.py", "from frankenmerge import __version__", False),
        ("planning/plan.py", "from frankenmerge.analysis.align import align", True),
        ("planning/plan.py", "def plan():\n    from ..merging import writer", True),
        ("errors.py", "from . import storage", True),
        ("artefacts/recipe.py", "def f():\n    import frankenmerge.donors.checkpoint", True),
        ("merging/writer.py", "from frankenmerge.workflows import merging", True),
        ("splicing/resolve.py", "import frankenmerge.cli", True),
    ],
)
def test_direction(path, source, wrong):
    found = imports_of(Path("frankenmerge", path), source)
    assert any(against_direction(each) for each in found) == wrong


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("cli/demo.py", "def demo():\n    import torch", False),
        ("merging/writer.py", "if TYPE_CHECKING:\n    from torch import Tensor", False),
        ("analysis/align.py", "import torch", False),
        ("donors/checkpoint.py", "from safetensors import safe_open", False),
        ("donors/checkpoint.py", "from safetensors.torch import load_file", True),
        ("cli/demo.py", "try:\n    import transformers.utils\nexcept ImportError:\n    pass", True),
        ("splicing/resolve.py", "class Splice:\n    from torch import nn", True),
        ("cli/demo.py", "from frankenmerge.models.loading import load_model", True),
        ("splicing/methods/combine.py", "import torch", False),
        ("splicing/methods/__init__.py", "import torch", True),
        ("merging/writer.py", "from frankenmerge.splicing.methods import METHODS", False),
        ("merging/writer.py", "from frankenmerge.splicing.methods.combine import combine", True),
    ],
)
def test_lightness(path, source, wrong):
    found = imports_of(Path("frankenmerge", path), source)
    assert any(against_lightness(each) for each in found) == wrong
