"""The inputs that torch tests its own modules and functions with, from the installed wheel: ours give what torch
gives."""

import pytest
import torch

pytest.importorskip("expecttest")  # torch's test inputs need it

from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

from tileformer import decoder, kernels
from tileformer.decoder.nn.convert import TWINS
from tileformer.kernels import use_backend

SERVERS = [  # backend, share of the samples: interpreting all takes minutes
    pytest.param("torch", 1, id="torch"),
    pytest.param("interpret", 25, id="interpret", marks=pytest.mark.interprets),
    pytest.param("interpret", 1, id="interpret-all", marks=[pytest.mark.interprets, pytest.mark.slow]),
]
served = pytest.mark.parametrize("server, share", SERVERS)
# A kernel gets its scalars in float32, so in float64 the scale is as exact as that.
CLOSE: dict[str, dict] = dict(torch=dict(rtol=1e-7, atol=1e-7), interpret=dict(rtol=1e-4, atol=1e-5))
MODULES = {info.module_cls: info for info in module_db if info.module_cls in TWINS}


def flat(x):
    return [y for part in x for y in flat(part)] if isinstance(x, (tuple, list)) else [x]


def gradients(outputs, leaves):
    outputs = [x for x in flat(outputs) if isinstance(x, torch.Tensor) and x.requires_grad]
    weights = [torch.linspace(-1, 1, max(x.numel(), 1), dtype=x.dtype)[: x.numel()].view(x.shape) for x in outputs]
    return torch.autograd.grad(outputs, leaves, weights, allow_unused=True) if outputs and leaves else ()


def run(cls, sample, training, server):
    """Outputs and gradients of a module; every draw of torch's generator is the same for both."""
    torch.manual_seed(0)
    module = cls(*sample.constructor_input.args, **sample.constructor_input.kwargs).double().train(training)
    given, named = sample.forward_input.args, sample.forward_input.kwargs
    tensors = [x for x in flat([*given, *named.values()]) if isinstance(x, torch.Tensor) and x.requires_grad]
    with use_backend(server):
        outputs = module(*given, **named)
        return outputs, gradients(outputs, [*dict.fromkeys(tensors), *module.parameters()])


@pytest.mark.filterwarnings("ignore")
@served
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("cls", MODULES, ids=lambda cls: cls.__name__)
def test_modules(cls, training, server, share) -> None:
    info = MODULES[cls]
    samples = info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=True, training=training)
    tried = 0
    for sample in list(samples)[::share]:
        theirs = run(cls, sample, training, "torch")
        ours = run(TWINS[cls], sample, training, server)
        torch.testing.assert_close(ours, theirs, equal_nan=True, **CLOSE[server])
        tried += 1
    assert tried


FUNCTIONS = {
    "nn.functional.scaled_dot_product_attention": kernels.scaled_dot_product_attention,
    "nn.functional.layer_norm": kernels.layer_norm,
    "softmax": lambda x, dim, dtype=None: decoder.Softmax(dim)(x if dtype is None else x.to(dtype)),
    "log_softmax": lambda x, dim, dtype=None: decoder.LogSoftmax(dim)(x if dtype is None else x.to(dtype)),
    "nn.functional.cross_entropy": lambda x, target, **options: decoder.CrossEntropyLoss(**options)(x, target),
}


@pytest.mark.filterwarnings("ignore")
@served
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name, server, share) -> None:
    info = next(info for info in op_db if info.name == name and not info.variant_test_name)
    tried = 0
    for sample in list(info.sample_inputs("cpu", torch.float64, requires_grad=True))[::share]:
        given = [sample.input, *sample.args, *sample.kwargs.values()]
        leaves = [x for x in given if isinstance(x, torch.Tensor) and x.requires_grad]
        if sample.kwargs.get("dropout_p"):  # our random numbers are others
            continue
        theirs = info.op(sample.input, *sample.args, **sample.kwargs)
        with use_backend(server):
            ours = FUNCTIONS[name](sample.input, *sample.args, **sample.kwargs)
            found = ours, gradients(ours, leaves)
        torch.testing.assert_close(found, (theirs, gradients(theirs, leaves)), equal_nan=True, **CLOSE[server])
        tried += 1
    assert tried
