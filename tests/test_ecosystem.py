"""What people do to modules besides calling them: save, cast, compile, export, checkpoint, map, share among threads."""

import asyncio
import copy
import importlib
import io
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tileformer.decoder import TransformerDecoderLayer, TransformerEncoderLayer, convert
from tileformer.kernels import attention, autograd, backend, interpreter, softmax, use_backend

B, T_Q, T_K, C = 2, 4, 6, 8
TARGET, MEMORY = (torch.randn(B, T, C, generator=torch.Generator().manual_seed(T)) for T in (T_Q, T_K))
CAUSAL = torch.ones(T_Q, T_Q, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * T_K, [False] * 4 + [True] * 2])


def layer(dropout: float = 0.0) -> TransformerDecoderLayer:
    torch.manual_seed(0)
    return TransformerDecoderLayer(C, 2, 16, dropout, batch_first=True)


def call(net: Any, target: Tensor = TARGET, memory: Tensor = MEMORY) -> Tensor:
    """The layer with its three masks."""
    causal, padding = CAUSAL.to(target.device), PADDING.to(target.device)
    return net(target, memory, tgt_mask=causal, memory_key_padding_mask=padding, tgt_is_causal=True)


def test_saved_weights_and_saved_modules(tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    net, file = layer(), io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other = TransformerDecoderLayer(C, 2, 16, 0.0, batch_first=True)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(call(other), call(net))
    safetensors.save_model(net, str(tmp_path / "layer.safetensors"))
    theirs = nn.TransformerDecoderLayer(C, 2, 16, 0.0, batch_first=True)  # a file of ours is a file of torch's
    safetensors.load_model(theirs, str(tmp_path / "layer.safetensors"))
    torch.testing.assert_close(call(theirs), call(net))
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    assert torch.equal(call(torch.load(file, weights_only=False)), call(net))


def test_a_converted_model_is_copied_and_saved() -> None:
    class Wide(nn.TransformerDecoderLayer):
        """A subclass that changes nothing of the computation."""

    torch.manual_seed(0)
    net = nn.Sequential(Wide(C, 2, 16, 0.0, batch_first=True))
    convert(net)
    assert isinstance(net[0], Wide)
    assert torch.equal(call(copy.deepcopy(net)[0]), call(net[0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_casts(dtype) -> None:
    net = layer().to(dtype)
    out = call(net, TARGET.to(dtype), MEMORY.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), call(layer()), rtol=0.05, atol=0.05)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in net.parameters())


def test_built_without_memory_and_given_weights() -> None:
    with torch.device("meta"):
        net = TransformerDecoderLayer(C, 2, 16, 0.0, batch_first=True)
    assert call(net, TARGET.to("meta"), MEMORY.to("meta")).shape == TARGET.shape
    net = net.to_empty(device="cpu")
    net.load_state_dict(layer().state_dict())
    assert torch.equal(call(net), call(layer()))


def test_checkpointed_activations_replay_the_same_dropout() -> None:
    def gradients(through: Any) -> list[Any]:
        net = layer(dropout=0.3).train()
        torch.manual_seed(5)
        x = TARGET.clone().requires_grad_()
        through(net, x).square().sum().backward()
        return [x.grad, *(p.grad for p in net.parameters())]

    plain = gradients(call)
    for reentrant in (False, True):
        torch.testing.assert_close(gradients(partial(checkpoint, call, use_reentrant=reentrant)), plain)


def test_functional_call_and_vmap() -> None:
    net = layer().eval()
    others = [layer() for _ in range(3)]
    for i, other in enumerate(others):
        nn.init.normal_(other.linear1.weight, std=0.1 + i)
    stacked, buffers = torch.func.stack_module_state(others)
    masks = dict(tgt_mask=CAUSAL, tgt_is_causal=True)

    def one(parameters: Any, target: Tensor) -> Tensor:
        return torch.func.functional_call(net, (parameters, buffers), (target, MEMORY), masks)

    mapped = torch.vmap(one, in_dims=(0, None))(stacked, TARGET)
    expected = torch.stack([other(TARGET, MEMORY, **masks) for other in others])
    torch.testing.assert_close(mapped, expected)
    per_item = torch.vmap(torch.func.grad(lambda p, x: one(p, x).sum()), in_dims=(0, None))(stacked, TARGET)
    for i, other in enumerate(others):
        expected = torch.autograd.grad(other(TARGET, MEMORY, **masks).sum(), other.linear1.weight)[0]
        torch.testing.assert_close(per_item["linear1.weight"][i], expected)


def test_threads_share_a_layer() -> None:
    net, found = layer().eval(), {}

    def work(i: int) -> None:
        with use_backend("reference" if i % 2 else "torch"), torch.no_grad():
            found[i] = [call(net, TARGET + i) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        for i in range(6):
            torch.testing.assert_close(found[i], [call(net, TARGET + i)] * 5)


def test_tasks_of_one_thread_keep_their_backends() -> None:
    async def task(name: str, seen: list[str]) -> None:
        with use_backend(name):
            for _ in range(3):
                await asyncio.sleep(0)
                seen.append(backend.current_backend())
        seen.append(backend.current_backend())

    async def together() -> dict[str, list[str]]:
        seen: dict[str, list[str]] = {"torch": [], "interpret": [], "reference": []}
        await asyncio.gather(*(task(*item) for item in seen.items()))
        return seen

    for name, seen in asyncio.run(together()).items():
        assert seen == [name] * 3 + ["auto"]

    def suspended() -> Generator[None, None, None]:
        with use_backend("reference"):
            yield

    generator = suspended()
    next(generator)
    assert backend.current_backend() == "reference"  # as the docstring says: the caller's context is the generator's
    generator.close()
    assert backend.current_backend() == "auto"


@pytest.mark.interprets
@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")  # dynamo
def test_what_is_compiled_follows_the_backend() -> None:
    torch.compiler.reset()
    seen: list[str] = []
    op = lambda x: softmax(x)  # noqa: E731

    def inside(x: Tensor) -> Tensor:
        with use_backend("interpret"):
            return softmax(x)

    def listen(graph: Any, inputs: Any) -> Any:
        seen.append("interpret" if "softmax_fwd" in graph.code else "torch")
        return graph.forward

    compiled, chosen = (torch.compile(f, fullgraph=True, backend=listen) for f in (op, inside))

    def work() -> None:  # in a thread that has never chosen
        with torch.no_grad():
            compiled(TARGET)
            for name in ("interpret", "torch", "interpret"):
                with use_backend(name):
                    compiled(TARGET)
            chosen(TARGET)
            compiled(TARGET)

    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == ["torch", "interpret", "torch", "interpret"]  # by default, twice chosen, inside; then found again
    assert backend.current_backend() == "auto"


@pytest.mark.interprets
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_born_while_a_thread_interprets(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, interpreted = threading.Event(), interpreter._interpreted

    def slowly(function: Any) -> Any:
        inside.set()
        time.sleep(0.2)
        return interpreted(function)

    monkeypatch.setattr(interpreter, "_interpreted", slowly)

    def work() -> None:
        with use_backend("interpret"):
            softmax(TARGET)

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(10)
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    thread.join()
    for _ in range(500):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.02)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert status == 0


@pytest.fixture
def reloadable() -> Iterator[list[ModuleType]]:
    """The modules of kernels/ and decoder/ that are loaded; what they hold is put back afterwards."""
    modules = [m for name, m in sorted(sys.modules.items()) if re.match(r"tileformer\.(kernels|decoder)\b", name)]
    namespaces, ops = [dict(vars(m)) for m in modules], [(op, dict(vars(op))) for op in autograd.registered.values()]
    yield modules
    for module, names in zip(modules, namespaces, strict=True):
        vars(module).update(names)
    for op, state in ops:
        vars(op).update(state)


def _works() -> None:
    kernels, layers = sys.modules["tileformer.kernels"], sys.modules["tileformer.decoder"]
    net = nn.TransformerEncoderLayer(C, 2, 16, 0.0, batch_first=True)
    expected = net(TARGET)
    layers.convert(net)
    for name in ("torch", "interpret"):
        with kernels.use_backend(name):
            x = TARGET.clone().requires_grad_()
            torch.testing.assert_close(net(x), expected)
            (kernels.dropout(net(x), 0.5) + kernels.log_softmax(x)).sum().backward()
            kernels.cross_entropy(x[0], torch.tensor([0, 1, 2, 3])).backward()
            assert x.grad is not None


@pytest.mark.interprets
def test_every_file_can_be_reloaded_in_any_order(reloadable: list[ModuleType]) -> None:
    for modules in (reloadable[::-1], random.Random(0).sample(reloadable, len(reloadable))):
        for module in modules:
            importlib.reload(module)
        _works()


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("softmax", "    return y\n\n\ndef softmax_bwd", "    return y.add_(1.0)\n\n\ndef softmax_bwd"),
        ("attention.launchers", "    return out, lse, bounds\n", "    return out.add_(1.0), lse, bounds\n"),
    ],
)
@pytest.mark.interprets
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_what_was_edited_and_reloaded_is_what_runs(name, old, new, reloadable: list[ModuleType]) -> None:
    x, op = TARGET[None], {"softmax": softmax}.get(name, lambda x: attention(x, x, x))
    with use_backend("interpret"):
        before = op(x)
        module = sys.modules[f"tileformer.kernels.{name}"]
        source = Path(str(module.__file__)).read_text()
        assert source.count(old) == 1
        exec(compile(source.replace(old, new), str(module.__file__), "exec"), vars(module))
        torch.testing.assert_close(op(x), before + 1)
        torch.testing.assert_close(torch.vmap(op)(x[None])[0], before + 1)  # through the dispatcher


def test_an_op_may_come_back_with_another_signature(reloadable: list[ModuleType]) -> None:
    def made(body: str) -> Any:
        names: dict[str, Any] = {"Tensor": Tensor}
        exec(f"def reloaded_op({body}", names)
        return autograd.register(names["reloaded_op"], names["reloaded_op"])

    for body, arguments in (
        ("x: Tensor) -> Tensor: return x * 2", ()),
        ("x: Tensor, n: int) -> Tensor: return x * n", (3,)),
    ):
        factor = arguments[0] if arguments else 2
        torch.testing.assert_close(made(body)(TARGET, *arguments), TARGET * factor)
    assert made("x: Tensor, n: int) -> Tensor: return x + n")(TARGET, 1).equal(TARGET + 1)
    del autograd.registered["reloaded_op"]


class Masked(nn.Module):
    """The layer with its masks inside, as exporters want it: tensors in, one tensor out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = layer().eval()

    def forward(self, target: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        causal = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).triu(1)
        return self.layer(target, memory, tgt_mask=causal, memory_key_padding_mask=padding, tgt_is_causal=True)


def test_an_exported_layer_takes_other_lengths() -> None:
    batch, t_q, t_k = (torch.export.Dim(name, min=2, max=64) for name in ("B", "T_q", "T_k"))
    shapes = {"target": {0: batch, 1: t_q}, "memory": {0: batch, 1: t_k}, "padding": {0: batch, 1: t_k}}
    program = torch.export.export(Masked(), (TARGET, MEMORY, PADDING), dynamic_shapes=shapes)
    longer = torch.randn(3, 9, C), torch.randn(3, 11, C), torch.rand(3, 11) > 0.7
    for given in ((TARGET, MEMORY, PADDING), longer):
        torch.testing.assert_close(program.module()(*given), Masked()(*given))


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_onnx_of_a_decoder_layer(tmp_path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    file = str(tmp_path / "layer.onnx")
    with use_backend("torch"):
        torch.onnx.export(
            Masked(),
            (TARGET, MEMORY, PADDING),
            file,
            dynamo=True,
            input_names=["target", "memory", "padding"],
            verbose=False,
        )
    session = runtime.InferenceSession(file)
    given = {"target": TARGET.numpy(), "memory": MEMORY.numpy(), "padding": PADDING.numpy()}
    (out,) = session.run(None, given)
    torch.testing.assert_close(torch.from_numpy(out), Masked()(TARGET, MEMORY, PADDING), rtol=1e-4, atol=1e-5)


def test_a_model_with_hooks_on_every_module() -> None:
    net = nn.TransformerEncoder(TransformerEncoderLayer(C, 2, 16, 0.0, batch_first=True), 2, enable_nested_tensor=False)
    convert(net)
    seen: list[str] = []
    for name, module in net.named_modules():
        module.register_forward_hook(lambda m, i, o, name=name: seen.append(name))
    net.eval()(TARGET)
    assert set(seen) == {name for name, module in net.named_modules() if not isinstance(module, nn.ModuleList)}
