"""The modules import one way, keep their underscored names to themselves, and stay readable in
size.

    train_*.py, tools/, detection/ -> engine/ -> kd_losses -> the loss files -> torch
                                      engine/ -> network, dataset -> utils -> torch
"""

import ast
import functools
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MOST_LINES, MOST_COLUMNS = 700, 100
LAYERS = [  # each may import those before it, and of its own layer what makes no circle
    {"utils"},
    {"network", "dataset"},
    {"kd_losses"},
    {"engine"},
    {"train_base", "train_kd"},
    {"detection", "tools", "examples"},
]
OURS = set().union(*LAYERS)


@functools.cache
def sources() -> dict[str, ast.Module]:
    """{dotted name: syntax tree} of every module but the tests."""
    found = {}
    for path in sorted(ROOT.glob("*.py")) + sorted(
        path for name in OURS for path in (ROOT / name).glob("*.py")
    ):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(name: str, tree: ast.Module) -> set[tuple[str, str]]:
    """(module, name or '') of everything of ours that a module imports, wherever in its text."""
    found = set()
    package = name if name in ("kd_losses", "engine") else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                module = f"{package}.{module}".strip(".")
            found |= {(module, alias.name) for alias in node.names}
    return {(module, what) for module, what in found if module.split(".")[0] in OURS}


def target(module: str, what: str, modules) -> str:
    """The module that an import reaches."""
    return f"{module}.{what}" if f"{module}.{what}" in modules else module


def wrong_imports(modules: dict[str, ast.Module]) -> list[str]:
    """What breaks the rules, in a line each."""
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    wrong, graph = [], {}
    for name, tree in modules.items():
        reached = {target(*pair, modules) for pair in imports(name, tree)} - {name}
        graph[name] = reached
        own = name.split(".")[0]
        for other in sorted(reached):
            if level[other.split(".")[0]] > level[own]:
                wrong.append(f"{name} imports {other}, which is above it")
        if own == "kd_losses":
            loss_file = "." in name and not name.endswith("._wiring")
            outside = {x for x in reached if x.split(".")[0] != "kd_losses"}
            if outside or (loss_file and reached):
                wrong.append(f"{name} imports {', '.join(sorted(reached))}")
    try:
        TopologicalSorter(graph).prepare()
    except ValueError as error:
        wrong.append(f"imports in a circle: {' -> '.join(error.args[1])}")
    return wrong


def underscored(modules: dict[str, ast.Module], names=None) -> list[str]:
    """Uses of names with an underscore from another file; names: of all modules."""
    wrong, names = [], names or set(modules)
    for name, tree in modules.items():
        aliases = set()
        for module, what in imports(name, tree):
            if what.startswith("_") and (name, what) != ("kd_losses", "_wiring"):
                wrong.append(f"{name} imports {what} of {module}")
            aliases.add((what or module).split(".")[0])
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in aliases & {x.split(".")[-1] for x in names}
                and node.attr.startswith("_")
                and not node.attr.startswith("__")
            ):
                wrong.append(f"{name} uses {node.value.id}.{node.attr}")
    return wrong


def test_imports_run_one_way():
    assert wrong_imports(sources()) == []
    assert underscored(sources()) == []


@pytest.mark.parametrize(
    "name, line, told",
    [
        ("utils", "import network", "utils imports network, which is above it"),
        ("network", "from engine import cli", "network imports engine.cli, which is above it"),
        ("engine.run", "def f():\n    import train_kd", "engine.run imports train_kd"),
        ("kd_losses.at", "from utils import UserError", "kd_losses.at imports utils"),
        ("kd_losses.at", "from .st import SoftTarget", "kd_losses.at imports kd_losses.st"),
        ("dataset", "import network\n", None),
        ("engine.published", "from engine import distiller", "imports in a circle"),
        ("engine.cli", "from engine.run import _line", "engine.cli imports _line of engine.run"),
        ("train_kd", "import utils\nutils._control = 1", "train_kd uses utils._control"),
    ],
)
def test_a_planted_import_is_found(name, line, told):
    tree = ast.Module([*sources()[name].body, *ast.parse(line).body], [])
    modules = sources() | {name: tree}
    found = wrong_imports(modules) + underscored({name: tree}, set(modules))
    assert not found if told is None else any(told in x for x in found), found


@pytest.mark.parametrize(
    "path", ["train_base.py", "train_kd.py", "detection/train_det.py", "tools/eval.py"]
)
def test_utils_comes_before_torch(path):
    """It says how torch's threads wait, which they read when torch is imported."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    names = [
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    assert names.index("utils") < min(i for i, x in enumerate(names) if x in OURS - {"utils"})
    assert names.index("utils") < names.index("torch")


def python_files() -> list[Path]:
    folders = [ROOT, *(ROOT / name for name in (*sorted(OURS), "tests", "results", "docs"))]
    deep = {path for folder in folders[1:] if folder.is_dir() for path in folder.rglob("*.py")}
    return sorted({*ROOT.glob("*.py"), *deep})


def test_files_and_lines_are_short():
    long = []
    for path in python_files():
        lines = path.read_text(encoding="utf-8").splitlines()
        if len(lines) > MOST_LINES:
            long.append(f"{path.relative_to(ROOT)}: {len(lines)} lines")
        long += [
            f"{path.relative_to(ROOT)}:{i}: {len(line)} columns"
            for i, line in enumerate(lines, 1)
            if len(line) > MOST_COLUMNS
        ]
    assert long == []


def test_the_loop_fits_on_two_screens():
    text = (ROOT / "train_kd.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 450
    (step,) = (
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name == "train_step"
    )
    assert step.end_lineno - step.lineno < 60


def test_the_formatter_is_on():
    """Nothing is switched off with a comment."""
    off = subprocess.run(
        [
            "grep",
            "-rln",
            "--include=*.py",
            "fmt: " + "off",
            *sorted(OURS & {"engine", "kd_losses"}),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert off.stdout == ""
