"""The shape of the house: imports point downward, nothing goes in circles, and importing does nothing.

Imports are parsed, not run. Those under `TYPE_CHECKING` obey the order like any other, since a type is knowledge too;
they are left out of the search for cycles, since they never run. There is no exception to either rule.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

import pytest

import alphaquant

SOURCE = Path(alphaquant.__file__).parent

# From top to bottom. Rooms on one line do not know each other. "" is the package's own face, `alphaquant/__init__.py`.
ORDER = (
    ("__main__",),
    ("cli",),
    ("terminal",),
    ("demo",),
    ("",),
    ("api",),
    ("report", "allocation", "verification"),
    ("gptq",),
    ("pipeline",),
    ("evaluation", "calibration"),
    ("layouts",),
    ("models",),
    ("checkpoint",),
    ("solver",),
    ("engines",),
    ("plan",),
    ("rules",),
    ("patterns",),
    ("formats",),
    ("numerics", "wording", "compiled"),
    ("errors",),
)
# What a room may import at all, where that is less than everything below it.
ONLY = {
    "formats": {"errors"},
    "checkpoint": {"errors"},
    "solver": {"formats", "numerics", "compiled", "errors"},
    "models": {"checkpoint", "plan", "formats", "numerics", "compiled", "errors"},  # and so not the solver
    "engines": {"plan", "formats", "errors"},
    "numerics": set(),
    "wording": set(),
    "compiled": set(),
}
# Slow or optional packages: never imported by importing alphaquant.
LAZY = {"datasets", "huggingface_hub", "lm_eval", "matplotlib", "scipy", "transformers", "triton", "vllm"}
# Modules of ours that need such a package whole: they import it, and are imported like it.
LAZY_MODULES = {"alphaquant.solver.kernels"}


class Import(NamedTuple):
    """One imported name: the module that imports, the dotted target, and how."""

    module: str
    target: str
    line: int
    is_typing: bool
    is_top_level: bool


def modules_of(root: Path) -> dict[str, ast.Module]:
    """Every module below a package directory by dotted name, parsed."""
    trees = {}
    for path in sorted(root.rglob("*.py")):
        parts = [root.name, *path.relative_to(root).with_suffix("").parts]
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return trees


def is_typing_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports_of(name: str, tree: ast.Module) -> list[Import]:
    """Every import of one module, wherever it stands."""
    found: list[Import] = []

    def visit(node: ast.AST, *, typing: bool, top: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(name, alias.name, node.lineno, typing, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: imports are absolute"
            found.extend(Import(name, f"{node.module}.{a.name}", node.lineno, typing, top) for a in node.names)
        inner = top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and is_typing_guard(node):
            for child in node.body:
                visit(child, typing=True, top=inner)
            for child in node.orelse:
                visit(child, typing=typing, top=inner)
            return
        for child in ast.iter_child_nodes(node):
            visit(child, typing=typing, top=inner)

    visit(tree, typing=False, top=True)
    return found


def internal(trees: dict[str, ast.Module]) -> list[Import]:
    """Imports of the package's own modules, with the module as their target."""
    package = next(iter(trees)).partition(".")[0]
    found = []
    for name, tree in trees.items():
        for item in imports_of(name, tree):
            if item.target.partition(".")[0] == package:
                target = item.target if item.target in trees else item.target.rpartition(".")[0]
                found.append(item._replace(target=target))
    return found


def room(module: str) -> str:
    return [*module.split("."), ""][1]


def order_faults(trees: dict[str, ast.Module]) -> list[str]:
    """Imports that point upward or sideways, or to what a room may not know."""
    height = {name: -level for level, rooms in enumerate(ORDER) for name in rooms}
    faults = [f"{name}: give the room {room(name)!r} its place in ORDER" for name in trees if room(name) not in height]
    if faults:
        return faults
    for item in internal(trees):
        above, below = room(item.module), room(item.target)
        if above == below:
            continue
        if item.target not in trees:
            faults.append(f"{item.module}:{item.line} imports {item.target}, which is no module")
        elif height[below] >= height[above]:
            faults.append(f"{item.module}:{item.line} imports {item.target}, which is not below it")
        elif below not in ONLY.get(above, {below}):
            faults.append(f"{item.module}:{item.line} imports {item.target}: {above} knows only {sorted(ONLY[above])}")
    return faults


def cycle(trees: dict[str, ast.Module]) -> list[str] | None:
    """One circle of run-time imports, or None."""
    reached: dict[str, set[str]] = {name: set() for name in trees}
    for item in internal(trees):
        if item.is_typing:
            continue
        # importing a.b.c runs a and a.b first, unless they are being imported already
        parents = [".".join(item.target.split(".")[:n]) for n in range(2, item.target.count(".") + 1)]
        reached[item.module] |= {item.target, *(p for p in parents if not f"{item.module}.".startswith(f"{p}."))}
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for target in sorted(reached.get(name, ())):
            if (found := walk(target, [*path, name])) is not None:
                return found
        done.add(name)
        return None

    return next((found for name in sorted(trees) if (found := walk(name, [])) is not None), None)


def is_lazy(item: Import) -> bool:
    """Whether an import brings in what must not come with the package."""
    needs = item.target.partition(".")[0] in LAZY and item.module not in LAZY_MODULES
    return needs or item.target in LAZY_MODULES


def side_effects(trees: dict[str, ast.Module]) -> list[str]:
    """Statements that do something when a module is imported, and any look at the environment."""
    faults = []
    for name, tree in trees.items():
        if room(name) == "__main__":  # which is run, never imported
            continue
        for node in tree.body:
            if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
                faults.append(f"{name}:{node.lineno} runs {ast.unparse(node)[:40]} at import")
            if isinstance(node, ast.For | ast.While | ast.With | ast.Delete | ast.AugAssign):
                faults.append(f"{name}:{node.lineno} runs a {type(node).__name__} at import")
        faults += [
            f"{name}:{node.lineno} reads the environment"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "putenv")
        ]
        faults += [
            f"{name}:{item.line} imports {item.target} at import"
            for item in imports_of(name, tree)
            if item.is_top_level and not item.is_typing and is_lazy(item)
        ]
    return faults


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return modules_of(SOURCE)


def test_the_parser_sees_the_package(trees):
    assert len(trees) > 40
    seen = {(item.module, item.target) for item in internal(trees)}
    assert ("alphaquant.cli.quantize", "alphaquant.pipeline") in seen
    assert ("alphaquant.formats.codec", "alphaquant.formats.grid") in seen
    typing = {(item.module, item.target) for item in internal(trees) if item.is_typing}
    assert ("alphaquant.solver.gptq", "alphaquant.solver.factor") in typing


def test_imports_point_downward(trees):
    assert order_faults(trees) == []


def test_nothing_imports_the_command(trees):
    assert [i for i in internal(trees) if room(i.target) == "cli" and room(i.module) not in ("cli", "__main__")] == []


def test_models_and_solver_do_not_know_each_other(trees):
    pairs = {(room(i.module), room(i.target)) for i in internal(trees)}
    assert ("models", "solver") not in pairs
    assert ("solver", "models") not in pairs


def test_no_import_cycles(trees):
    assert cycle(trees) is None


def test_the_allocator_s_solver_knows_no_tensors(trees):
    for name in ("solve", "problem", "simple", "table"):
        run = {i.target for i in imports_of("", trees[f"alphaquant.allocation.{name}"]) if not i.is_typing}
        foreign = {target for target in run if target.startswith(("torch", "alphaquant."))}
        assert {".".join(target.split(".")[1:3]) for target in foreign} <= {
            "allocation.solve",
            "errors.AlphaQuantError",
            "errors.PlanError",
        }


def test_importing_does_nothing(trees):
    assert side_effects(trees) == []


@pytest.mark.parametrize(
    ("module", "line", "check"),
    [
        ("formats/grid.py", "from alphaquant.plan import Plan", order_faults),
        ("formats/grid.py", "from alphaquant import plan", order_faults),
        ("formats/grid.py", "def f():\n    import alphaquant.models.spec", order_faults),
        ("models/moe.py", "from alphaquant.solver import solve", order_faults),
        ("solver/gptq.py", "from alphaquant.models import Source", order_faults),
        ("checkpoint/reader.py", "from alphaquant.formats import Scheme", order_faults),
        ("pipeline/run.py", "from alphaquant.cli import app", order_faults),
        ("pipeline/run.py", "from alphaquant import __version__", order_faults),
        ("calibration/texts.py", "from alphaquant.evaluation import Quality", order_faults),
        ("plan.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import alphaquant.models", order_faults),
        ("new.py", "x = 1", order_faults),
        ("formats/spec.py", "from alphaquant.formats.codec import quantize", cycle),
        ("formats/spec.py", "from alphaquant.formats import FORMATS", cycle),
        ("solver/scales.py", "def f():\n    from alphaquant.solver.method import Recipe", cycle),
        ("formats/spec.py", "import os\nx = os.environ.get('X')", side_effects),
        ("formats/spec.py", "print('hello')", side_effects),
        ("calibration/texts.py", "import datasets", side_effects),
        ("solver/gptq.py", "from alphaquant.solver import kernels", side_effects),
    ],
)
def test_a_broken_house_is_noticed(trees, module, line, check):
    path = SOURCE / module
    name = f"alphaquant.{module.removesuffix('.py').replace('/', '.')}"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    assert check(trees | {name: ast.parse(f"{text}\n{line}\n")})
