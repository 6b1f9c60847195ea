"""Compare every op with its definition once on a GPU that is new here: a compiler can be wrong without a word.

`launch.py` asks for it before a process's first launches. Some seconds of compilation leave a stamp in Triton's cache
folder, for this kind of GPU, this Triton and this tileformer. TILEFORMER_SELFTEST=0 turns it off.
"""

import contextlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton

import tileformer
from tileformer.kernels import launch, reference
from tileformer.kernels.attention import attention, launchers
from tileformer.kernels.attention.decode import decode_attention
from tileformer.kernels.backend import Backend, use_backend
from tileformer.kernels.cross_entropy import cross_entropy
from tileformer.kernels.dropout import bias_activation_dropout, dropout
from tileformer.kernels.layer_norm import layer_norm
from tileformer.kernels.linear_cross_entropy import linear_cross_entropy
from tileformer.kernels.rotary import rotary
from tileformer.kernels.softmax import softmax

TOLERANCE = 0.05  # of the largest element: garbage, not rounding, which makes 0.01 in bfloat16
CALLS: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any]]] = {  # differentiable tensors, other arguments
    "attention": (dict(q=(1, 2, 70, 64), k=(1, 1, 300, 64), v=(1, 1, 300, 64)), dict(causal="bottom_right")),
    # On Hopper another forward: one tile ahead, through tensor descriptors; or, opted in for both, hopper.py's.
    "attention, long": (
        dict(q=(1, 1, 130, 128), k=(1, 1, 1100, 128), v=(1, 1, 1100, 128)),
        dict(causal="bottom_right"),
    ),
    "decode_attention": (  # several splits, the last of the second row without a key
        dict(q=(2, 4, 1, 64), k=(2, 2, 1100, 64), v=(2, 2, 1100, 64)),
        dict(lengths=torch.tensor([1050, 300], dtype=torch.int32)),
    ),
    "layer_norm": (dict(x=(37, 128), weight=(128,), bias=(128,)), dict(normalized_shape=(128,))),
    "softmax": (dict(x=(37, 128)), dict(scale=0.5)),
    "cross_entropy": (dict(logits=(37, 128)), dict(target=torch.arange(37), reduction="sum")),
    "linear_cross_entropy": (  # float32 sums of products in 16 bits, the weight's gradient over two chunks
        dict(input=(4100, 8), linear_weight=(16, 8)),
        dict(target=torch.arange(4100) % 16, reduction="sum"),
    ),
    "bias_activation_dropout": (
        dict(x=(37, 128), bias=(128,), up=(37, 128)),
        dict(activation="gelu", p=0.3, seed=torch.tensor([7])),
    ),
    "rotary": (dict(x=(1, 2, 37, 64)), dict(cos=torch.linspace(-1, 1, 37 * 32).view(37, 32), sin=torch.ones(37, 32))),
    "dropout": (dict(x=(37, 128), residual=(37, 128)), dict(p=0.3, seed=torch.tensor([7]))),
}
OPS: dict[str, Any] = {
    op.__name__: op
    for op in (
        attention,
        bias_activation_dropout,
        cross_entropy,
        decode_attention,
        dropout,
        layer_norm,
        linear_cross_entropy,
        rotary,
        softmax,
    )
}


def failures(backend: Backend, device: torch.device) -> list[str]:
    """The results that are not what the definition gives, "attention: dk" say, forward and backward in bfloat16."""
    wrong = []
    for call, (shapes, options) in CALLS.items():
        op, results = call.partition(",")[0], list[list[torch.Tensor]]()
        definition = getattr(reference, op)
        for compute, place, dtype in ((definition, "cpu", torch.float32), (OPS[op], device, torch.bfloat16)):
            generator = torch.Generator().manual_seed(1)
            draw = lambda *size: torch.randn(size, generator=generator).bfloat16().to(place, dtype)  # noqa: B023, E731
            differentiable = op != "decode_attention"
            leaves = {name: draw(*shape).requires_grad_(differentiable) for name, shape in shapes.items()}
            # clone: this module may have been imported in inference mode
            more = {name: x.clone().to(place) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
            with use_backend(backend):
                out = compute(**leaves, **more)
            gradients = torch.autograd.grad(out, list(leaves.values()), draw(*out.shape)) if differentiable else ()
            results.append([out.detach(), *gradients])
        for name, truth, got in zip(["out", *(f"d{name}" for name in shapes)], *results, strict=False):
            if not (got.cpu().float() - truth).abs().max() <= TOLERANCE * truth.abs().max():
                wrong.append(f"{call}: {name}")
    return wrong


def run_once(device: torch.device) -> None:
    """Test the GPU unless its stamp is there; `launch.selftest_due` stays True until it has passed.

    Left to a later launch in a fork without CUDA, while torch traces or captures, and in a backward, whose thread
    the test's own would wait for.

    Raises:
        RuntimeError: if a result is wrong, and again at the next launch.
    """
    busy = torch.cuda._is_in_bad_fork() or torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1
    if busy or torch.cuda.is_current_stream_capturing():
        return
    gpu = torch.cuda.get_device_properties(device)
    kind = f"tileformer {tileformer.__version__}, triton {triton.__version__}, sm_{gpu.major}{gpu.minor}, {gpu.name}"
    if launchers.HOPPER and (gpu.major, gpu.minor) == (9, 0):
        kind += ", with TILEFORMER_HOPPER=1"
    stamp = Path(triton.knobs.cache.dir) / (re.sub(r"\W+", "-", kind) + ".passed")
    launch.selftest_due = False  # the test's own launches ask for none
    if stamp.exists():
        return
    try:
        with ThreadPoolExecutor(1) as pool:  # where no caller's autocast, grad mode, stream or backend is in force
            wrong = pool.submit(failures, "triton", device).result()
        if wrong:
            raise RuntimeError(
                f"{'; '.join(wrong)}: wrong on {kind}: "
                "see `tileformer check`, use_backend('torch') or TILEFORMER_SELFTEST=0"
            )
    except BaseException:
        launch.selftest_due = True
        raise
    with contextlib.suppress(OSError):  # a folder that cannot be written: the next process tests again
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()
