"""The package as a stranger meets it: import, command line, a machine's report, the environment."""

import argparse
import collections
import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import tileformer
from tileformer import __main__ as command
from tileformer.kernels import info

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "decoder", "training", "bench")

OTHERS = "ignore:The pynvml package:FutureWarning"  # torch's, where that package is installed


def python(*arguments: str, source: Path = ROOT / "src", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a fresh Python that finds tileformer under `source`, from the repository's root."""
    env = {**os.environ, "PYTHONPATH": str(source), "PYTHONWARNINGS": OTHERS}
    return subprocess.run([sys.executable, *arguments], env=env, cwd=cwd, capture_output=True, text=True, timeout=300)


def succeed(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stderr
    return result.stdout


# Import


def test_importing_every_room_starts_no_gpu_driver():
    code = f"""
import importlib, torch
from triton.runtime import driver
for room in {ROOMS}:
    importlib.import_module("tileformer." + room)
assert driver._active is None, "a Triton driver is active"
assert not torch.cuda.is_initialized(), "CUDA is initialised"
"""
    succeed(python("-W", "error", "-W", OTHERS, "-c", code))


def test_importing_the_package_alone_does_not_wait_for_torch():
    succeed(python("-c", "import sys, tileformer; assert 'torch' not in sys.modules"))


@pytest.mark.parametrize("left_behind", ["nothing", "text files"])  # an archive without links; git where links are off
def test_a_copy_that_lost_its_links_still_imports(tmp_path, left_behind):
    package = tmp_path / "src" / "tileformer"
    package.mkdir(parents=True)
    for file in (ROOT / "src" / "tileformer").glob("*.py"):
        shutil.copy(file, package)
    for room in ROOMS:
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
        if left_behind == "text files":
            (package / room).write_text(f"../../{room}")
    code = "from tileformer import kernels, decoder; print(kernels.attention.__module__, decoder.__file__)"
    shown = succeed(python("-c", code, source=package.parent, cwd=tmp_path))
    assert shown.split() == ["tileformer.kernels.attention", str(tmp_path / "decoder" / "__init__.py")]
    assert "Exit status:" in succeed(python("-m", "tileformer", "--help", source=package.parent, cwd=tmp_path))


def test_transformers_imports_from_the_root_beside_a_folder_named_kernels():
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed: it looks for a package named `kernels`, as our folder is")
    succeed(python("-c", "import transformers; transformers.AutoModel"))


# Command line


def test_help_teaches_without_importing_torch():
    code = """
import runpy, sys
sys.argv = ["tileformer", "--help"]
try:
    runpy.run_module("tileformer", run_name="__main__")
except SystemExit as exit:
    assert exit.code == 0
assert "torch" not in sys.modules
"""
    shown = succeed(python("-c", code))
    assert all(f"  {verb}" in shown for verb in command.VERBS)
    assert "tileformer train g2p " in shown and "Exit status:" in shown


@pytest.mark.parametrize("verb", command.VERBS)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main([verb, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    room = importlib.import_module(command.VERBS[verb])
    assert room.__doc__.splitlines()[0] in shown
    assert shown.count("\n") > 5


def test_a_reader_that_leaves_early_is_no_error():
    code = """
from tileformer import __main__ as command
from tileformer.kernels import info
info.main = lambda args: [print(line) for line in range(99999)]
command.main(["info"])
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONWARNINGS": OTHERS}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as writer:
        writer.stdout.readline()
        writer.stdout.close()
        assert writer.stderr.read() == b""
    assert writer.returncode == 141


def test_the_version_is_one_string():
    assert succeed(python("-m", "tileformer", "--version")) == f"tileformer {tileformer.__version__}\n"


@pytest.mark.parametrize("words", [[], ["fly"], ["info", "--wings"]])
def test_wrong_usage_exits_with_2(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(words)
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("raised", "status", "shown"),
    [
        (ValueError("two\nlines"), 2, "tileformer: error: two lines\n"),
        (FileNotFoundError(2, "No such file", "x.json"), 2, "tileformer: error: x.json: no such file\n"),
        (info.DeviceError("no device"), 2, "tileformer: error: no device\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_an_expected_error_is_one_line(monkeypatch, capsys, raised, status, shown):
    def fail(args):
        raise raised

    room = types.SimpleNamespace(add_arguments=lambda parser: None, main=fail)
    monkeypatch.setitem(sys.modules, "tileformer.kernels.info", room)
    assert command.main(["info"]) == status
    assert capsys.readouterr().err == shown


def test_streams_that_the_caller_closed(monkeypatch, capsys):
    """`2>&-` is silence, `<&-` is nothing to read, `>&-` is refused: a result would be lost."""
    seen = []

    def verb(args):
        print("told", file=sys.stderr)
        print("result")
        seen.append(sys.stdin.read())
        return 0

    room = types.SimpleNamespace(add_arguments=lambda parser: None, main=verb)
    monkeypatch.setitem(sys.modules, "tileformer.kernels.info", room)
    with monkeypatch.context() as patch:
        for name in ("stdin", "stderr"):
            patch.setattr(sys, name, None)
        assert command.main(["info"]) == 0 and seen == [""]
        assert sys.stderr.isatty() is False
    assert capsys.readouterr() == ("result\n", "")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        assert command.main(["info"]) == 2 and len(seen) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "tileformer: error: standard output is closed: send it to a file, or to /dev/null"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_behind_the_output_is_one_line(monkeypatch, capsys):
    room = types.SimpleNamespace(add_arguments=lambda parser: None, main=lambda args: print("result") or 0)
    monkeypatch.setitem(sys.modules, "tileformer.kernels.info", room)
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert command.main(["info"]) == 2
    assert capsys.readouterr().err == "tileformer: error: no space left on device\n"


@pytest.mark.parametrize(
    ("value", "chosen"), [("", "auto"), ("torch", "torch"), ("fastest", "fastest"), ("cuda", None)]
)
def test_the_backend_of_the_environment(monkeypatch, value, chosen):
    monkeypatch.setenv("TILEFORMER_BACKEND", value)
    fresh = lambda: runpy.run_path(str(ROOT / "kernels" / "backend.py"))["current_backend"]()  # noqa: E731
    if chosen:
        assert fresh() == chosen
    else:
        with pytest.raises(
            ValueError, match="^TILEFORMER_BACKEND: unknown backend 'cuda': choose one of auto, fastest, "
        ):
            fresh()


def test_a_bug_keeps_its_traceback(monkeypatch):
    room = types.SimpleNamespace(add_arguments=lambda parser: None, main=lambda args: [][0])
    monkeypatch.setitem(sys.modules, "tileformer.kernels.info", room)
    with pytest.raises(IndexError):
        command.main(["info"])


# The machine's report


@pytest.fixture
def unusable_gpu(monkeypatch):
    """A machine whose GPU the system shows and torch cannot use."""
    monkeypatch.setattr(info, "system_driver", lambda: "550.54.15")
    monkeypatch.setattr(info, "_cuda_usable", lambda: (False, "it sees no CUDA device (the driver is too old)"))


def test_a_gpu_that_torch_cannot_use_stops_the_work(unusable_gpu, capsys):
    with pytest.raises(info.DeviceError, match="550.54.15") as caught:
        info.require_device()
    message = str(caught.value)
    assert torch.__version__ in message and "too old" in message and "--device cpu" in message and "\n" not in message
    assert command.main(["info"]) == 1
    assert capsys.readouterr().out.splitlines()[0] == f"problem        {message}"


def test_asking_for_the_cpu_goes_on_without_the_gpu(unusable_gpu, capsys):
    assert info.require_device("cpu") == torch.device("cpu")
    assert command.main(["info", "--device", "cpu"]) == 0
    assert "550.54.15" in capsys.readouterr().out


def test_no_gpu_means_the_cpu(monkeypatch):
    monkeypatch.setattr(info, "system_driver", lambda: None)
    monkeypatch.setattr(info, "_cuda_usable", lambda: (False, "it sees no CUDA device"))
    assert info.require_device() == torch.device("cpu")
    with pytest.raises(info.DeviceError, match="cuda was asked for, but torch cannot use CUDA: it sees no"):
        info.require_device("cuda")


@pytest.mark.parametrize(("device", "message"), [("gpu", "unknown device 'gpu'"), ("mps", "mps is not supported")])
def test_a_wrong_device_is_named(device, message):
    with pytest.raises(info.DeviceError, match=message):
        info.require_device(device)


@pytest.mark.gpu
def test_cuda_is_the_default_where_torch_can_use_it():
    assert info.require_device() == info.require_device("cuda") == torch.device("cuda", torch.cuda.current_device())
    with pytest.raises(info.DeviceError, match="does not exist"):
        info.require_device(f"cuda:{torch.cuda.device_count()}")
    assert info.collect()["backend"]["name"] in ("triton", "torch")


def test_a_system_without_device_files_has_no_driver(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(info, "_DEVICE_FILES", (str(tmp_path), "nvidia[0-9]*"))
    assert info.system_driver() is None  # also in a container that sees only its host's driver
    (tmp_path / "nvidia3").touch()
    monkeypatch.setattr(info, "_DRIVER_FILE", str(tmp_path / "version"))
    assert info.system_driver() == "of unknown version"
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar 5 22:23:56 UTC 2024"
    )
    assert info.system_driver() == "550.54.15"


def test_what_triton_lacks_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/proc/no/such/cache")
    tools, missing = info._tools()
    assert tools["compiler"] is None and tools["cache"] is None and tools["ptxas"]
    assert "no-such-compiler" in missing[0] and "TRITON_CACHE_DIR" in missing[-1]


def test_the_report_is_also_json(capsys):
    args = argparse.Namespace(device="cpu", json=True)
    assert info.main(args) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == torch.__version__
    assert report["backend"] == {"device": "cpu", "name": "torch", "why": report["backend"]["why"]}


# Set up


@pytest.mark.slow
def test_an_environment_is_made_of_a_lenders_packages_without_a_registry(tmp_path):
    """What `make test`, `demo`, `bench` and `gpu-day` start with on a GPU machine that reaches nobody."""
    environment = dict(os.environ, PIP_NO_INDEX="1", PIP_CONFIG_FILE="/dev/null", PYTHON=sys.executable)
    environment.pop("PYTHONPATH", None)
    environment.pop("PIP_FIND_LINKS", None)
    made = subprocess.run(
        [ROOT / ".ci" / "venv", tmp_path / "venv"], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert "keeping the torch and triton of" in succeed(made) and len(made.stdout.splitlines()) <= 2, made.stdout
    for name, arguments in (("tileformer", ("info", "--device", "cpu")), ("pytest", ("--version",))):
        command = [tmp_path / "venv" / "bin" / name, *arguments]
        succeed(subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True))


# The GPU's compile budget


def test_this_run_compiled_few_gpu_specialisations(gpu_specialisations):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: nothing was compiled for one")
    compiled = gpu_specialisations()
    assert len(compiled) <= 120, collections.Counter(compiled).most_common()
