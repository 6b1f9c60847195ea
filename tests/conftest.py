"""What all tests share: one thread, poisoned fresh memory, the backends this machine has, the GPU's budget."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy loads: its threads make the interpreter slower
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS starts: deterministic mode asks for it

os.environ.setdefault("TILEFORMER_SELFTEST", "0")  # the tests do more, and count what is compiled

import contextlib
import functools
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

import hypothesis
import pytest
import torch
from triton.runtime.jit import JITFunction

from tileformer.bench import ahead
from tileformer.kernels import interpreter, use_backend

torch.set_num_threads(1)
if threading.current_thread() is threading.main_thread():
    # A shell's background job is born deaf to Ctrl-C, and so are its children: the tests of a stop send it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Deterministic mode fills fresh memory with NaN (or the largest integer): an element that a kernel forgot to write
# cannot pass by luck. torch's own CUDA operators that have no deterministic form may warn, but not fail a test of ours.
torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]

# Files that, beside a GPU, run compiled: few enough calls for a cold cache (test_gpu.py counts them). The files of
# single ops sweep over hundreds of specialisations; they stay interpreted, in a process without the GPU, unless
# --gpu-full asks for minutes of compilation.
COMPILED_FILES = ("test_values", "test_attention", "test_gpu")
EXAMPLES = 30  # of each op that test_fuzz.py draws


def device_for(backend: str) -> torch.device:
    """Where the tensors of a test of this backend live."""
    return torch.device("cuda" if backend == "triton" else "cpu")


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend that runs the Triton kernels here, in force during the test: compiled where CUDA is, else
    interpreted."""
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def device(backend: str) -> torch.device:
    """The device that belongs to `backend`."""
    return device_for(backend)


@pytest.fixture
def gpu_specialisations() -> Callable[[], list[str]]:
    """Every kernel of ours that this process compiled, once a specialisation. A test that asks for this runs last."""

    def collect() -> list[str]:
        found = []
        for kernel in _kernels():
            keys = {key for cache in kernel.device_caches.values() for key in cache[0]}
            found += [kernel.fn.__name__] * len(keys)
        return sorted(found)

    return collect


def _kernels() -> list[JITFunction]:
    rooms = [module for name, module in list(sys.modules.items()) if name.startswith("tileformer.")]
    kernels = {id(value): value for room in rooms for value in vars(room).values() if isinstance(value, JITFunction)}
    return list(kernels.values())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        file = metafunc.module.__name__.rpartition(".")[2]
        compiled = torch.cuda.is_available() and (file in COMPILED_FILES or metafunc.config.getoption("--gpu-full"))
        metafunc.parametrize("backend", ["triton" if compiled else "interpret"], indirect=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz", type=int, metavar="N", help="test_fuzz.py: N new examples for each op instead of the same few"
    )
    parser.addoption(
        "--cached",
        type=int,
        metavar="N",
        help="test_cached_equals_full.py: N sequences of each kind, and what they came to",
    )
    parser.addoption(
        "--gpu-full", action="store_true", help="on a GPU, compile the sweeps of every op too (an hour when cold)"
    )
    parser.addoption("--all-verbs", action="store_true", help="test_verbs.py: every case, not a dozen")
    parser.addoption("--sample", type=int, default=1, metavar="N", help="run only every Nth of the selected tests")


def pytest_configure(config: pytest.Config) -> None:
    new = config.getoption("--fuzz")
    hypothesis.settings.register_profile(
        "tileformer",
        max_examples=new or EXAMPLES,
        derandomize=not new,  # the same examples in every run
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],  # shrinking runs the interpreter for minutes
        suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
    )
    hypothesis.settings.load_profile("tileformer")


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None, Any, Any]:
    items.sort(key=lambda item: "gpu_specialisations" in getattr(item, "fixturenames", ()))
    for item in items:
        if _interprets(item):
            item.add_marker("interprets")
        if _parameters(item).get("backend") == "triton":
            item.add_marker("gpu")
    result = yield  # -m and -k select
    step = config.getoption("--sample")
    config.hook.pytest_deselected(items=[item for place, item in enumerate(items) if place % step])
    items[:] = items[::step]
    return result


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def _interprets(item: pytest.Item) -> bool:
    return item.get_closest_marker("interprets") is not None or "interpret" in _parameters(item).values()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Beside a GPU: compile on all cores what the tests will launch, before the first of them waits for it."""
    if (
        torch.cuda.is_available()
        and not session.config.option.collectonly
        and not hasattr(session.config, "workerinput")
    ):
        said = ahead.compile_here([functools.partial(_uncomputed, item) for item in session.items])
        session.config.get_terminal_writer().line(said)


def _uncomputed(item: pytest.Item) -> None:
    """Run a test's body on the recording driver, as far as it gets without values: what it launched is compiled
    ahead."""
    given = {**_parameters(item), "device": torch.device("cpu")}
    names = item._fixtureinfo.argnames  # type: ignore[attr-defined]
    if given.get("backend") == "triton" and set(names) <= set(given):
        with contextlib.suppress(pytest.fail.Exception, pytest.skip.Exception):
            item.obj(**{name: given[name] for name in names})  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _only_marked_tests_interpret(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not _interprets(request.node):

        def refuse(*args: object) -> None:
            raise AssertionError(
                "a test that interprets needs @pytest.mark.interprets: beside a GPU it is run elsewhere"
            )

        monkeypatch.setattr(interpreter, "run", refuse)


@pytest.fixture(autouse=True)
def _launches_are_made_anew() -> None:
    """A launcher keeps a launch for each shape: without this, a test that changes a tile would meet the launch of the
    test before."""
    for name, module in list(sys.modules.items()):
        if name.startswith("tileformer.kernels."):
            for kept, value in vars(module).items():
                if "launch" in kept and hasattr(value, "cache_clear"):
                    value.cache_clear()


def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.manual_seed(0)  # each test draws the same numbers, whichever ran before it in this process
    if torch.cuda.is_available() and _interprets(item):
        pytest.skip("interpreted in a process of its own, by tests/test_gpu.py")
    for marker in item.iter_markers("gpu"):
        needed = marker.kwargs.get("devices", 1)
        if torch.cuda.device_count() < needed:
            pytest.skip(f"needs {needed} CUDA device(s), torch sees {torch.cuda.device_count()}")
