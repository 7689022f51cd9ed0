"""Who may import whom and who may touch which files: read from the sources."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import get_args

import pytest

from calib.ranges import RANGE_METHODS
from converter.config import keys
from converter.config.keys import ActivationQuantMethod, QuantType, TargetDevice
from converter.modes import MODES
from converter.plan.targets import TARGETS

ROOT = Path(__file__).parents[1]
PACKAGES = ("calib", "converter")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

# What passes and writers may know: what is asked, graphs, tables and plans.
ALLOWED = {"errors", "config", "job", "graph", "plan", "prepare"}
# The rooms in order: a room imports only rooms before it.
ROOMS = (
    "errors",
    "version",
    "config",
    "job",
    "graph",
    "plan",
    "prepare",
    "emit",
    "calibrate",
    "measure",
    "doctor",
    "weights",
    "learn",
    "report",
    "modes",
    "pipeline",
    "batch",
    "api",
    "cli",
    "start",
    "__main__",
)
# What of `weights` is plain numbers, and what holds or runs graphs.
ALGORITHMS = (
    *("gptq", "grids", "integer", "mixed_bits", "moments", "smoothquant", "stored", "trained"),
)
OF_GRAPHS = (
    *("onnx", "calib.session", "calib.samples"),
    *("converter.graph", "converter.emit", "converter.calibrate", "converter.measure"),
)
# What `qconvert batch` needs to see that nothing has changed.
LIGHT = ("converter.api", "converter.batch", "converter.measure.gates")
RANK = {room: rank for rank, room in enumerate(ROOMS)}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path) -> Iterator[str]:
    """The full names of the modules that `path` imports, anywhere in it."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)


def top(module: str) -> str:
    return module.split(".")[0]


def room_of(module: str) -> str:
    """`prepare` of `converter.prepare.names`."""
    return module.split(".")[1]


def is_cli(module: str) -> bool:
    return module.startswith("converter.cli")


def calls_of(path: Path) -> set[str]:
    """What `path` calls: 'print', 'ir.save', '.SerializeToString'."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found.add(node.func.id)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            found |= {f"{owner}.{node.func.attr}", f".{node.func.attr}"}
    return found


@cache
def attributes_of(path: Path) -> set[str]:
    """The names behind dots that `path` reads: 'outputs' of `node.outputs[0]`."""
    return {node.attr for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute)}


def callers_of(*names: str) -> set[str]:
    return {module for module, path in MODULES.items() if calls_of(path) & set(names)}


def importers_of(*names: str) -> set[str]:
    return {
        m
        for m, path in MODULES.items()
        if any(top(i) in names or i in names for i in imports_of(path))
    }


def test_the_sources_are_found():
    assert {"calib.affine", "converter.cli", "converter.prepare", "converter.prepare.names"} <= set(
        MODULES
    )
    assert "converter.prepare.names" in set(imports_of(MODULES["converter.prepare"]))


@pytest.mark.parametrize("module", [m for m in MODULES if top(m) == "calib"])
def test_calib_stands_alone(module):
    allowed = {"calib", "numpy", "onnxruntime", "PIL", *sys.stdlib_module_names}
    assert {top(name) for name in imports_of(MODULES[module])} <= allowed


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("converter.")])
def test_rooms_import_only_rooms_before_them(module):
    name = room_of(module)
    assert name in RANK, f"give {module} a place in ROOMS"
    for imported in imports_of(MODULES[module]):
        if imported.startswith("converter."):
            assert RANK[room_of(imported)] <= RANK[name], f"{module} imports {imported}"


def test_no_module_imports_itself_in_a_circle():
    # What is imported for type checkers alone does not count.
    graph = {
        module: set(imports_of(path)) & set(MODULES) - {module} for module, path in MODULES.items()
    }
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("package", ["prepare", "emit"])
def test_graph_changes_know_only_the_tables(package):
    for module in MODULES:
        if module.startswith(f"converter.{package}."):
            known = {room_of(i) for i in imports_of(MODULES[module]) if i.startswith("converter.")}
            assert known - {package} <= ALLOWED, f"{module} imports {known}"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithms_are_arrays_and_plans_in_arrays_and_plans_out(name):
    module = f"converter.weights.{name}"
    of_graphs = [i for i in imports_of(MODULES[module]) if i.startswith(OF_GRAPHS)]
    assert not of_graphs, (
        f"{module} imports {of_graphs}: let its caller (converter/plan/units.py, the walk) read "
        "the graph, and hand it arrays"
    )


def test_what_help_needs_is_light():
    heavy = {"onnx", "onnx_ir", "onnxscript", "onnxruntime", "numpy"}
    for module, path in MODULES.items():
        if module.startswith(
            (
                "converter.config",
                "converter.errors",
                "converter.job",
                "converter.plan.targets",
                *LIGHT,
            )
        ):
            light = module != "converter.plan.targets"  # formats come with numpy
            assert not {top(i) for i in imports_of(path)} & (
                heavy if light else heavy - {"numpy"}
            ), module


def test_no_test_file_imports_another():
    for path in (ROOT / "tests").glob("*.py"):
        lenders = [name for name in imports_of(path) if name.startswith("test_")]
        assert not lenders, f"{path.name}: move what {lenders} lend to a module that is no test"


def named_operators(path: Path) -> Iterator[int]:
    """Lines of `path` that compare an op_type with operators by name."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            asks = any(isinstance(side, ast.Attribute) and side.attr == "op_type" for side in sides)
            inner = (part for side in sides for part in ast.walk(side))
            names = (part for part in inner if isinstance(part, ast.Constant))
            if asks and any(isinstance(part.value, str) for part in names):
                yield node.lineno


MOST_POSITIONAL = 4


def many_positional(path: Path) -> Iterator[str]:
    """The functions of `path` that take more arguments by position than a reader tells apart."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            names = [each.arg for each in (*node.args.posonlyargs, *node.args.args)]
            names = names[names[:1] in (["self"], ["cls"]) :]
            if len(names) > MOST_POSITIONAL:
                yield f"line {node.lineno}: {', '.join(names)}"


def test_arguments_beyond_four_are_named_where_a_function_is_called():
    for module, path in MODULES.items():
        many = list(many_positional(path))
        assert not many, (
            f"{module}, {many}: write `*` after the first few, or hand over a value that exists"
        )


def test_operators_are_known_by_the_table_alone():
    # A pass of `prepare` may be about one operator, in one written form; so may a gradient.
    free = ("converter.plan.ops", "converter.graph.qdq", "converter.prepare.", "converter.learn.")
    for module, path in MODULES.items():
        lines = list(named_operators(path))
        assert not lines or module.startswith(free), (
            f"{module}, lines {lines}: ask the operator's row (`rule_of(node)`), and make what it "
            "is asked a fact of the rows of OPS in converter/plan/ops.py."
        )


# Tables whose rows a config names: what a row is, where the table stands, and the names that the
# config knows.
NAMED = {
    "range method": (RANGE_METHODS, "_METHODS in calib/ranges/__init__.py", ActivationQuantMethod),
    "target": (TARGETS, "TARGETS in converter/plan/targets.py", TargetDevice),
    "mode": (
        {k: v for k, v in MODES.items() if "FLOAT" not in k},
        "MODES in converter/modes/__init__.py",
        QuantType,
    ),
}


@pytest.mark.parametrize("what", NAMED)
def test_what_a_table_has_a_config_can_name(what):
    table, place, names = NAMED[what]
    alias = next(name for name, value in vars(keys).items() if value is names)
    unnamed, missing = set(table) - set(get_args(names)), set(get_args(names)) - set(table)
    assert not unnamed, (
        f"no config can ask for the {what} {unnamed}: add it to {alias} in "
        "converter/config/keys.py, and run docs/update_readme.py"
    )
    assert not missing, f"{alias} in converter/config/keys.py offers {missing}: add it to {place}"


@pytest.mark.parametrize(
    ("section", "key"), [(row.name, key) for row in keys.SECTIONS.values() for key in row.keys]
)
def test_every_key_is_read_where_it_takes_effect(section, key):
    readers = {module for module, path in MODULES.items() if key in attributes_of(path)}
    assert readers - {"converter.config.rules"}, (
        f"nothing asks for `.{key}` of [{section}]: whoever sets it gets nothing for it. Read it "
        "from the config where it decides"
    )


def test_every_file_of_range_methods_has_a_row():
    known = {method.function.__module__ for method in RANGE_METHODS.values()}
    files = {m for m in MODULES if m.startswith("calib.ranges.")} - {"calib.ranges.spec"}
    assert files == known, (
        f"{files - known}: give what it holds a row of _METHODS in calib/ranges/__init__.py"
    )


def test_every_file_of_modes_has_a_row():
    known = {vars(mode)["__name__"] for mode in MODES.values()}
    files = {module for module in MODULES if module.startswith("converter.modes.")}
    assert files == known, f"{files ^ known}: a mode is a file with a row of MODES beside it"


def test_only_model_reads_and_writes_model_files():
    names = (
        "ir.save",
        "ir.load",
        "onnx.save",
        "onnx.save_model",
        "onnx.load",
        "onnx.load_model",
        ".SerializeToString",
    )
    assert callers_of(*names) == {"converter.graph.files", "converter.graph.mapped"}


def test_samples_run_where_sessions_are_opened_once():
    # Apart from them: what loads at all, what type a tensor has, and what a processor computes.
    asks = {"converter.graph.files", "converter.prepare.types", "converter.calibrate.exact"}
    runs = {"converter.calibrate.runs", "converter.calibrate.walk"}
    learns = {f"converter.learn.{name}" for name in ("blocked", "distil", "fine_tune", "pooling")}
    assert callers_of("open_session") == runs | asks | learns
    assert callers_of("ort.InferenceSession") == {"calib.session"}


def test_only_config_reads_ini():
    assert importers_of("configparser") <= {m for m in MODULES if m.startswith("converter.config")}
    assert importers_of("converter.config.reader", "converter.config.grammar") <= {
        m for m in MODULES if m.startswith("converter.config")
    }
    assert all(
        map(is_cli, callers_of("load_config") - {"converter.api", "converter.batch.manifest"})
    )


def test_only_the_command_line_talks_and_exits():
    talkers = callers_of("print", "input", "exit", "sys.exit", "click.echo")
    assert all(map(is_cli, talkers - {"converter.config.__main__"}))
    assert all(map(is_cli, importers_of("click")))
