"""Every file of examples/ runs, and prints what docs/tutorials.md says; what it claims, it asserts itself."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
NEEDS = {  # optional packages, and what brings them
    "hf_trainer": {"transformers": 'the extra "hf"', "accelerate": "pip install accelerate"},
    "lightning_module": {"lightning": "pip install lightning"},
    "lora": {"peft": 'the extra "hf"'},
    "onnx_export": {"onnxscript": 'the extra "export"', "onnxruntime": 'the extra "export"'},
    "packed_batches": {"safetensors": 'the extra "train"', "rich": 'the extra "train"'},
}
SHOWS = {
    "hf_trainer": r"0 left\n.*loss before 2\.\d+, after 30 steps 0\.\d+\n4 5 6 goes on with 7 8 9 10\n",
    "lightning_module": r"loss of the first step \d\.\d+, of the last 0\.\d+\n",
    "lora": r"torch\.nn: .* learn: 0 of 2\ntileformer: .* learn: 2 of 2\n",
    "onnx_export": r"[\d,]+ bytes; largest difference of onnxruntime to torch: \d\.\de-0[5-9]\n",
    "own_block": r"torch: .* definition \de-0\d\n".replace(r"\de", r"\d\.\de") + r"interpret: .*\n",
    "own_provider": r"tileformer .* ms\nby hand .* ms\ncareless .* not timed: error of out is \d+ times its budget\n",
    "packed_batches": r"in 1340 places; .* 2160\n.*\nloss 0\.\d+ after \d+ steps; 5 7 9 goes on with 11 13 15\n",
    "swap_transformer": r"modules swapped, 0 left\n.*\d\.\de-0\d\ntrained one step",
}


@pytest.mark.interprets
@pytest.mark.filterwarnings("ignore")  # those of other people's packages
@pytest.mark.parametrize("name", [name for name in NAMES if name != "ddp"])
def test_the_example_runs(name, capsys):
    for package, way in NEEDS.get(name, {}).items():
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: {way}")
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with torch.random.fork_rng():
        module.main()
    assert re.search(SHOWS[name], capsys.readouterr().out, re.DOTALL)


def test_two_processes_of_torchrun_train_one_model():
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(FOLDER / "ddp.py")]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(FOLDER.parent / "src"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"2 processes, the same weights in each; loss 3\.\d+ -> [0-2]\.\d+\n", done.stdout)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_says_how_to_run_it(name):
    source = (FOLDER / f"{name}.py").read_text()
    assert len(source.splitlines()) <= 60
    assert f"examples/{name}.py" in ast.get_docstring(ast.parse(source))
