"""Imports point down, rooms are imported by their full name, files stay short: docs/architecture.md, held."""

import ast
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tileformer.__main__ import VERBS

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "decoder", "training", "bench")  # each may import itself and what stands before it
OPS = ("attention", "cross_entropy", "dropout", "layer_norm", "softmax")
# An op dispatches to its definition; on CUDA the torch backend's dropout (in random.py) draws the definition's bits.
MAY_READ_THE_REFERENCE = (*OPS, "random")
LONGEST_FILE = 500

ROOM_FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
OUR_FILES = [*ROOM_FILES, *sorted((ROOT / "src" / "tileformer").glob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))]


class Import(NamedTuple):
    """One imported module. `names`: the words after `from ... import` (maybe modules too) or after `as`."""

    module: str
    names: tuple[str, ...]
    line: int
    text: str


def imports_of(source: str) -> list[Import]:
    """Every import of a file, also those inside functions; a relative one keeps its dots."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [Import(name.name, (name.asname or "",), node.lineno, ast.unparse(node)) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found.append(Import(module, tuple(name.name for name in node.names), node.lineno, ast.unparse(node)))
    return found


def rooms_reached(found: Import) -> set[str]:
    """The rooms of tileformer that an import reaches."""
    dotted = [f"{found.module}.{name}" for name in found.names] if found.text.startswith("from") else [found.module]
    return {parts[1] for parts in (name.split(".") for name in dotted) if parts[0] == "tileformer" and len(parts) > 1}


def problems_in(path: str, source: str) -> list[str]:
    """What is wrong with the imports of a file at `path` (relative to the repository)."""
    place = Path(path)
    room = place.parts[0]
    problems: list[str] = []

    def report(found: Import, *reasons: str) -> None:
        problems.extend(f"{path}:{found.line}: {found.text}: {why}" for why in reasons)

    for found in imports_of(source):
        top = found.module.split(".")[0]
        if found.module.startswith("."):
            report(found, "write the full name; a file imported under two names registers its ops twice")
        if top in ROOMS or top == "src":
            report(found, f"the room's name is tileformer.{top}")
        if top in ("tests", "conftest"):
            report(found, "nobody imports tests")
        if found.text.startswith("import tileformer.") and found.names != ("",):
            report(found, "this may bind the op instead of its module: use from ... import")
        if room not in ROOMS:
            continue
        above = set(ROOMS[ROOMS.index(room) + 1 :]) & rooms_reached(found)
        if above:
            report(found, f"{room} is below {', '.join(above)}")
        if not found.module.startswith(f"tileformer.{room}") and found.module.startswith("tileformer."):
            private = [word for word in (*found.module.split("."), *found.names) if re.match(r"_[^_]", word)]
            if private:
                report(found, f"{', '.join(private)} belongs to another room")
        if room == "kernels":
            report(found, *_inside_kernels(place, found))
    return problems


def _inside_kernels(place: Path, found: Import) -> list[str]:
    own_op = place.parts[1].removesuffix(".py")
    if place.name == "__init__.py" and len(place.parts) == 2:
        return []
    reached = {found.module, *(f"{found.module}.{name}" for name in found.names)}
    reached_modules = {name.split(".")[2] for name in reached if name.startswith("tileformer.kernels.")}
    problems: list[str] = []
    if own_op in OPS and (others := reached_modules & set(OPS) - {own_op}):
        problems.append(f"ops never import each other ({', '.join(sorted(others))})")
    if "reference" in reached_modules and own_op not in MAY_READ_THE_REFERENCE:
        problems.append("only an op's own file reads the reference, to dispatch to it and for its second derivative")
    if own_op == "reference" and reached_modules & set(OPS):
        problems.append("the reference stands on torch alone")
    return problems


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down(room):
    files = [path for path in ROOM_FILES if path.relative_to(ROOT).parts[0] == room]
    assert files, f"{room}/ holds no Python file"
    problems = [line for path in files for line in problems_in(str(path.relative_to(ROOT)), path.read_text())]
    assert not problems, "\n".join(problems)


def test_the_command_and_the_tests_use_full_names():
    others = [path for path in OUR_FILES if path not in ROOM_FILES]
    problems = [line for path in others for line in problems_in(str(path.relative_to(ROOT)), path.read_text())]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/softmax.py", "from tileformer.decoder import Seq2Seq"),
        ("kernels/softmax.py", "def f():\n    import tileformer.bench.check.run"),
        ("decoder/nn/layer.py", "from tileformer import training"),
        ("training/loop.py", "from tileformer.bench import timing"),
        ("kernels/softmax.py", "from . import reference"),
        ("kernels/softmax.py", "from .reference import softmax"),
        ("decoder/nn/layer.py", "from kernels import attention"),
        ("decoder/nn/layer.py", "import kernels.attention"),
        ("decoder/nn/layer.py", "import tileformer.kernels.attention as attention_module"),
        ("decoder/nn/layer.py", "from tileformer.kernels.attention import _Attention"),
        ("kernels/softmax.py", "from tileformer.kernels.attention import attention"),
        ("kernels/attention/forward.py", "from tileformer.kernels import softmax"),
        ("kernels/tile_ops.py", "from tileformer.kernels import reference"),
        ("kernels/reference.py", "from tileformer.kernels.softmax import softmax"),
        ("bench/check/run.py", "from tests.conftest import device_for"),
    ],
)
def test_the_parser_sees_a_forbidden_import(path, source):
    assert problems_in(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/softmax.py", "from tileformer.kernels import reference"),
        ("kernels/attention/forward.py", "from tileformer.kernels.attention.tiles import table"),
        ("decoder/nn/layer.py", "from tileformer.kernels import attention, dropout"),
        ("training/loop.py", "from tileformer.decoder import Seq2Seq\nfrom tileformer.kernels import cross_entropy"),
        ("bench/check/run.py", "from tileformer.kernels.info import require_device"),
        ("decoder/nn/layer.py", "from __future__ import annotations\nimport torch.nn.functional as F"),
    ],
)
def test_the_parser_lets_a_good_import_pass(path, source):
    assert not problems_in(path, source)


def _at_import(node: ast.AST) -> list[str]:
    """The modules that importing a file imports: what stands in a function waits for its call."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        return []
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        (*found,) = imports_of(ast.unparse(node))
        return [name for x in found for name in (x.module, *(f"{x.module}.{name}" for name in x.names))]
    return [name for child in ast.iter_child_nodes(node) for name in _at_import(child)]


def _reached(module: str, seen: set[str]) -> None:
    """Add a module of ours, its packages, and all that importing it imports."""
    for name in (module.rsplit(".", n)[0] for n in range(module.count(".") + 1)):
        path = ROOT / "src" / name.replace(".", "/")
        file = next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()), None)
        if name not in seen and (file or not name.startswith("tileformer")):
            seen.add(name)
            for imported in _at_import(ast.parse(file.read_text())) if file else ():
                _reached(imported, seen)


@pytest.mark.parametrize(
    ("verb", "extra"),
    [("info", ""), ("check", ""), ("bench", "bench"), ("train", "train"), ("finetune", "train"), ("generate", "train")],
)
def test_a_verb_starts_with_the_packages_that_it_lists(verb, extra):
    tomllib = pytest.importorskip("tomllib", reason="reads pyproject.toml, which Python 3.10 cannot")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *(project["optional-dependencies"][extra] if extra else ())]
    known = (
        {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in listed} | {"tileformer"} | sys.stdlib_module_names
    )
    seen: set[str] = set()
    _reached(VERBS[verb], seen)
    assert VERBS[verb] in seen and {name.split(".")[0] for name in seen} - known == set()


def test_every_import_is_a_declared_dependency():
    tomllib = pytest.importorskip("tomllib", reason="reads pyproject.toml, which Python 3.10 cannot")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    known = (
        {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in declared} | {"tileformer"} | sys.stdlib_module_names
    )
    known |= {"sklearn"} if "scikit_learn" in known else set()
    known |= {"mutants"}  # a neighbour of tests/mutation/__main__.py, which runs as a program
    imported = {found.module.split(".")[0] for path in OUR_FILES for found in imports_of(path.read_text())}
    assert imported - known == set()


def test_the_reference_never_calls_a_fused_attention():
    tree = ast.parse((ROOT / "kernels" / "reference.py").read_text())
    called = {
        node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert "scaled_dot_product_attention" not in called


def test_no_file_is_long():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in OUR_FILES}
    del lengths["tests/mutation/mutants.py"]  # data, one row a mutant, which has to stand in one file
    assert {path: length for path, length in lengths.items() if length > LONGEST_FILE} == {}
