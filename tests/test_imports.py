"""Imports run one way, and `--help` stays instant: read from the sources, importing nothing."""

import ast
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = (
    {"__init__", "errors", "families", "architectures", "inferred"},
    {
        "agreement",
        "atlas",
        "alignment",
        "lora",
        "meter",
        "pickles",
        "picture",
        "recipe",
        "schema",
        "settings",
        "splice",
        "vocabulary",
        "files",
        "headers",
        "hub",
        "models",
        "checkpoint",
        "blockwise",
        "processes",
        "gauge",
        "fitting",
        "drawing",
        "refining",
        "matching",
    },
    STAGES := {"analysis", "planning", "merging", "evaluation", "reporting"},
    {"demo"},
    {"cli", "api"},
    {"__main__"},
)
"""What lies directly in the package. A part imports from lower layers and its own; a stage from no other stage."""

HEAVY = ("torch", "transformers", "accelerate", "safetensors.torch")
METHODS = {f"merging.methods.{name}" for name in ("combine", "torch_span", "torch_sparse", "torch_select", "fusion")}
MAY_BE_HEAVY = {
    "models",
    "fitting",
    "drawing",
    "refining",
    "matching",
    "blockwise",
    "analysis",
    "evaluation",
    "reporting",
    "demo",
    *METHODS,
}
"""The parts and modules that may import these when they are imported; all others do it in the functions that need them."""


class Import(NamedTuple):
    path: Path
    line: int
    name: str
    """Dotted: a module, or what is taken from one."""
    at_once: bool
    """Whether it happens when the file is imported: outside functions, and not for type checkers alone."""

    @property
    def importer(self) -> str:
        return part_of(self.path)

    @property
    def imported(self) -> str | None:
        """The part of the package that is imported."""
        package, part, *_ = [*self.name.split("."), "", ""]
        return part if package == "frankenmerge" and layer_of(part) is not None else None

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: imports {self.name}"


def part_of(path: Path) -> str:
    return path.parts[1].removesuffix(".py")


def layer_of(part: str) -> int | None:
    return next((number for number, parts in enumerate(LAYERS) if part in parts), None)


def allowed(part: str) -> set[str]:
    own = layer_of(part)
    lower = set().union(*LAYERS[:own])
    return lower | ({part} if part in STAGES or own is None else LAYERS[own])


def is_heavy(module: str) -> bool:
    """Whether a dotted name in the package is one that may be heavy, or lies in one."""
    return any(f"{module}.".startswith(f"{heavy}.") for heavy in MAY_BE_HEAVY)


def imports_of(path: Path, source: str) -> Iterator[Import]:
    for node, at_once in _statements(ast.parse(source), True):
        if isinstance(node, ast.Import):
            prefix = []
        else:
            above = path.parent.parts[: len(path.parent.parts) + 1 - node.level] if node.level else ()
            prefix = [*above, *filter(None, [node.module])]
        for alias in node.names:
            yield Import(path, node.lineno, ".".join([*prefix, alias.name]), at_once)


def _statements(node: ast.AST, at_once: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, at_once
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        typing = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
        yield from _statements(child, at_once and not function and not typing)


def against_direction(found: Import) -> str | None:
    if found.imported is None or found.imported in allowed(found.importer):
        return None
    return f"{found}, but of the package {found.importer} may import only {', '.join(sorted(allowed(found.importer)))}"


def against_lightness(found: Import) -> str | None:
    if is_heavy(".".join(found.path.with_suffix("").parts[1:])) or not found.at_once:
        return None
    if any(f"{found.name}.".startswith(f"{heavy}.") for heavy in HEAVY):
        return f"{found} at module level, which makes `--help` slow; import it in the function that needs it"
    if found.name.startswith("frankenmerge.") and is_heavy(found.name.removeprefix("frankenmerge.")):
        return f"{found} at module level, which may import torch in its turn; import it in the function that needs it"
    return None


def files() -> list[Path]:
    return [path.relative_to(ROOT) for path in sorted((ROOT / "frankenmerge").rglob("*.py"))]


def faults(rule: Callable[[Import], str | None], imports: Iterable[Import]) -> list[str]:
    return [told for found in imports if (told := rule(found))]


@pytest.mark.parametrize("rule", [against_direction, against_lightness])
def test_package_keeps_the_rule(rule):
    imports = [found for path in files() for found in imports_of(path, (ROOT / path).read_text(encoding="utf-8"))]
    assert imports
    told = faults(rule, imports)
    assert not told, "\n" + "\n".join(told)


def test_every_module_has_a_layer():
    unplaced = [str(path) for path in files() if layer_of(part_of(path)) is None]
    assert not unplaced, f"place these in LAYERS: {', '.join(unplaced)}"


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("cli/demo.py", "from frankenmerge.planning.plan import plan", False),
        ("demo/show.py", "import frankenmerge.analysis.align", False),
        ("planning/plan.py", "from .search import Constraints", False),
        ("recipe.py", "from frankenmerge import __version__", False),
        ("planning/plan.py", "from frankenmerge.analysis.align import align", True),
        ("planning/plan.py", "def plan():\n    from ..merging import writer", True),
        ("errors.py", "from . import recipe", True),
        ("recipe.py", "import frankenmerge.cli", True),
        ("__init__.py", "from frankenmerge.recipe import Recipe", True),
    ],
)
def test_direction(path, source, wrong):
    assert bool(faults(against_direction, imports_of(Path("frankenmerge", path), source))) == wrong


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("cli/demo.py", "def demo():\n    import torch", False),
        ("merging/writer.py", "if TYPE_CHECKING:\n    from torch import Tensor", False),
        ("analysis/align.py", "import torch", False),
        ("checkpoint.py", "from safetensors import safe_open", False),
        ("checkpoint.py", "from safetensors.torch import load_file", True),
        ("cli/demo.py", "try:\n    import transformers.utils\nexcept ImportError:\n    pass", True),
        ("splice.py", "class Splice:\n    from torch import nn", True),
        ("cli/demo.py", "from frankenmerge.models import load_model", True),
        ("merging/methods/combine.py", "import torch", False),
        ("merging/methods/__init__.py", "import torch", True),
        ("recipe.py", "from frankenmerge.merging.methods import METHODS", False),
        ("merging/writer.py", "from frankenmerge.merging.methods.combine import combine", True),
        ("merging/writer.py", "from .methods import combine", True),
    ],
)
def test_lightness(path, source, wrong):
    assert bool(faults(against_lightness, imports_of(Path("frankenmerge", path), source))) == wrong
