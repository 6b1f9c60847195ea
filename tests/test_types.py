"""What a type checker sees of the public functions: names that are spelled wrong, and what comes back. mypy reads,
nothing runs."""

import os
import re
from pathlib import Path

import pytest

api = pytest.importorskip("mypy.api", reason="mypy is not installed")
SOURCE = Path(__file__).resolve().parents[1] / "src"
# torch, triton and numpy as stubs in which everything but a tensor is Any: mypy would read the real ones for a minute.
STUBS = {
    "torch": "class Tensor: ...\nclass dtype: ...\nclass device: ...\ndef zeros(*size: int) -> Tensor: ...\n",
    "triton": "",
    "numpy": "",
}
PROGRAM = """
import torch
from tileformer.kernels import attention, layer_norm, softmax, cross_entropy, dropout, use_backend
from tileformer.kernels.layer_norm import _layer_norm_forward  # from the op to its launcher, as a reader walks

q = torch.zeros(1, 1, 2, 4)
attention(q, q, q, causal="bottom")  # wrong
attention(q, q, q, causal="bottom_right")
attention(q, q, q, causal=True, align="top_right")  # wrong
attention(q, q, q, return_weights="mean")  # wrong
attention(q, q, q, return_weights="average")
use_backend("torchh")  # wrong
use_backend("interpret")
use_backend("fastest")
cross_entropy(q, q, reduction="avg")  # wrong
attention(q, q, q, windows=2)  # wrong
reveal_type(attention(q, q, q))  # Tensor
reveal_type(attention(q, q, q, return_lse=True))  # more
reveal_type(attention(q, q, q, return_weights=True))  # more
reveal_type(attention(q, q, q, return_lse=True, return_weights="average"))  # more
reveal_type(layer_norm(q, 4))  # Tensor
reveal_type(softmax(q))  # Tensor
reveal_type(cross_entropy(q, q))  # Tensor
reveal_type(dropout(q, 0.1))  # Tensor
reveal_type(_layer_norm_forward(q, 1, None, None, 1e-5, True))  # tuple[Tensor, Tensor]
_layer_norm_forward(q, "one", None, None, 1e-5, True)  # wrong
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[int, str]:
    """What mypy says of PROGRAM, by line."""
    folder = tmp_path_factory.mktemp("types")
    for package, text in STUBS.items():
        (folder / "stubs" / package).mkdir(parents=True)
        anything = "from typing import Any\ndef __getattr__(name: str) -> Any: ...\n"
        (folder / "stubs" / package / "__init__.pyi").write_text(anything + text)
    (folder / "program.py").write_text(PROGRAM)
    options = [
        "--config-file=",
        "--no-incremental",
        "--no-site-packages",
        "--follow-imports=silent",
        "--ignore-missing-imports",
        "--no-error-summary",
    ]
    before = os.environ.get("MYPYPATH")
    os.environ["MYPYPATH"] = f"{folder / 'stubs'}:{SOURCE}"
    try:
        shown, errors, _ = api.run(
            [*options, "--explicit-package-bases", "--namespace-packages", str(folder / "program.py")]
        )
    finally:
        os.environ.pop("MYPYPATH")
        if before is not None:
            os.environ["MYPYPATH"] = before
    assert not errors, errors
    said: dict[int, str] = {}
    for line, text in re.findall(r"program\.py:(\d+): (?:error|note): (.*)", shown):
        said[int(line)] = said.get(int(line), "") + text
    return said


LINES = dict(enumerate(PROGRAM.splitlines(), start=1))


@pytest.mark.parametrize("line", [line for line, text in LINES.items() if "(" in text and "import" not in text])
def test_mypy_sees(told, line):
    code, _, wanted = LINES[line].partition("  # ")
    if wanted == "more":
        assert told[line] != 'Revealed type is "torch.Tensor"', code
    elif "reveal_type" in code:
        assert told[line].replace("torch.", "") == f'Revealed type is "{wanted}"', code
    else:
        assert (line in told) == (wanted == "wrong"), f"{code}: {told.get(line)}"
