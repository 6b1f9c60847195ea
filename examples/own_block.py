"""A block of your own from the kernels: window, ALiBi, padding and dropout in one call that never stores the scores.

python examples/own_block.py
"""

import torch
from torch import Tensor, nn

from tileformer.kernels import attention, dropout, rms_norm, use_backend


class Block(nn.Module):
    """Pre-norm decoder block: each token sees the `window` tokens before it, nearer ones more."""

    def __init__(self, width: int, heads: int, window: int, rate: float) -> None:
        super().__init__()
        self.heads, self.window, self.rate = heads, window, rate
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scales = nn.Parameter(torch.ones(2, width))
        self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, heads + 1))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """x (B, T, C); real (B, T), True = no padding."""
        rate = self.rate if self.training else 0.0
        normed = rms_norm(x, x.shape[-1], self.scales[0])
        q, k, v = self.qkv(normed).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each: views
        attended = attention(
            q, k, v, causal=True, window=(self.window, 0), alibi_slopes=self.slopes, key_mask=real, dropout_p=rate
        )
        x = dropout(self.out(attended.transpose(1, 2).flatten(2)), rate, residual=x)
        hidden = torch.relu(self.up(rms_norm(x, x.shape[-1], self.scales[1])))
        return dropout(self.down(hidden), rate, residual=x)


def main() -> dict[str, float]:
    torch.manual_seed(0)
    block, x = Block(32, 4, window=3, rate=0.1), torch.randn(2, 10, 32)
    real = torch.arange(10) < torch.tensor([[10], [6]])
    block.eval()
    with torch.no_grad():
        with use_backend("reference"):  # the definition, in plain eager PyTorch
            expected = block(x, real)
        errors = {}
        for backend in ("torch", "interpret"):  # plain operators; the Triton kernels, interpreted
            with use_backend(backend):
                errors[backend] = (block(x, real) - expected)[real].abs().max().item()
            print(f"{backend}: largest difference to the definition {errors[backend]:.1e}")
    assert max(errors.values()) < 1e-5

    block.train()(x, real)[real].square().mean().backward()  # dropout is on; gradients are those of the kernels
    assert all(parameter.grad.isfinite().all() for parameter in block.parameters())
    return errors


if __name__ == "__main__":
    main()
