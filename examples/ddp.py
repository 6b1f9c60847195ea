"""Two processes train one model: DistributedDataParallel around our layers, started by torchrun.

torchrun --standalone --nproc-per-node 2 examples/ddp.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tileformer.decoder import Seq2Seq, Seq2SeqConfig
from tileformer.kernels import cross_entropy


def main(steps: int = 40) -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")  # torchrun's environment says the rest
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the same weights everywhere
    config = Seq2SeqConfig(20, 20, d_model=32, nhead=2, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=64)
    model: nn.Module = DistributedDataParallel(Seq2Seq(config).to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    draw = torch.Generator().manual_seed(rank)  # rows of its own for each process

    losses = []
    for _ in range(steps):
        source = torch.randint(3, 20, (32, 6), generator=draw).to(device)
        target, labels = source.roll(1, 1), source  # teacher forcing: copy the source
        target[:, 0] = config.bos_id
        loss = cross_entropy(model(source, target).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()  # DDP averages the gradients over the processes here
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / world)

    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    others = weights.clone()
    dist.broadcast(others, 0)
    assert torch.equal(weights, others), "the processes hold different weights"
    assert losses[-1] < losses[0] / 1.5
    if rank == 0:
        print(f"{world} processes, the same weights in each; loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
