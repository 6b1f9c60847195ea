"""Two processes on one machine (gloo): DDP and FSDP2 train our layers as one process does."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tileformer.decoder import Seq2Seq, Seq2SeqConfig, convert

STEPS, ROWS = 6, 8


def model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "converted":
        net = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
        convert(net)
        return net
    return Seq2Seq(Seq2SeqConfig(11, 13, 16, 2, 1, 1, 32, dropout=0.0))


def batch(kind: str, step: int):
    draw = torch.Generator().manual_seed(step)
    if kind == "converted":
        return torch.randn(ROWS, 7, 16, generator=draw), torch.randn(ROWS, 5, 16, generator=draw)
    return torch.randint(3, 11, (ROWS, 7), generator=draw), torch.randint(3, 13, (ROWS, 5), generator=draw)


def losses(net: nn.Module, kind: str, rank: int = 0, world: int = 1) -> list[float]:
    """The mean loss of each step, over all processes; each has its share of the rows."""
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    found = []
    for step in range(STEPS):
        source, target = (x[rank * ROWS // world : (rank + 1) * ROWS // world] for x in batch(kind, step))
        out = net(source, target)
        weight = torch.linspace(-1, 1, out.shape[-1])
        loss = (out * weight).sigmoid().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        total = loss.detach().clone()
        if world > 1:
            dist.all_reduce(total)
        found.append(float(total) / world)
    return found


def process(rank: int, port: int, kind: str, how: str) -> None:
    """One of the two; the first prints the losses."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    net = model(kind)
    if how == "DDP":
        net = nn.parallel.DistributedDataParallel(net)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for layer in [
            x for x in net.modules() if isinstance(x, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
        ]:
            fully_shard(layer.self_attn, mesh=mesh)  # a unit of its own: its weights are there only in its own call
            fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
    found = losses(net, kind, rank, 2)
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
@pytest.mark.parametrize("kind, how", [("converted", "FSDP2"), ("our own", "DDP")])
def test_two_processes_learn_what_one_does(kind: str, how: str) -> None:
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
    torch.testing.assert_close(json.loads(shown.splitlines()[-1]), losses(model(kind), kind), rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    process(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
