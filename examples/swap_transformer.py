"""Swap the layers of an nn.Transformer in place: same weights, same results with every mask, and the way back.

python examples/swap_transformer.py
"""

import torch
from torch import nn

from tileformer.decoder import convert, revert


def main() -> float:
    torch.manual_seed(0)
    model = nn.Transformer(64, 4, 2, 2, 128, dropout=0.0, batch_first=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    src, tgt = torch.randn(2, 9, 64), torch.randn(2, 7, 64)
    masks = dict(
        tgt_mask=torch.ones(7, 7).triu(1).bool(),  # True = may not attend, as in torch.nn
        src_key_padding_mask=torch.arange(9) >= torch.tensor([[9], [4]]),  # True = padding
        memory_key_padding_mask=torch.arange(9) >= torch.tensor([[9], [4]]),
        tgt_is_causal=True,
    )
    expected = model(src, tgt, **masks).detach()

    report = convert(model)  # what was swapped, what was left and why
    print(str(report).splitlines()[0])
    result = model(src, tgt, **masks)
    difference = (result - expected).abs().max().item()
    print(f"largest difference to torch's own layers: {difference:.1e}")
    assert difference < 1e-5

    before = model.decoder.layers[0].linear1.weight.detach().clone()
    result.square().mean().backward()
    optimizer.step()  # the optimiser made before `convert` keeps its parameters: they are the same objects
    assert not torch.equal(before, model.decoder.layers[0].linear1.weight)

    revert(model)
    assert all(type(module).__module__.startswith("torch.") for module in model.modules())
    print("trained one step, and went back to torch's classes")
    return difference


if __name__ == "__main__":
    main()
