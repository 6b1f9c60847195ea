"""LayerNorm and Dropout: torch.nn's modules, computed by our kernels."""

from torch import Tensor, nn

from tileformer.kernels import dropout, layer_norm


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` on the fused kernel: same arguments, parameters and state_dict keys."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last ``len(normalized_shape)`` axes of ``input`` (..., C); the dtype stays."""
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class Dropout(nn.Dropout):
    """``torch.nn.Dropout`` on the fused kernel; given a residual, it adds it in the same pass. Never in place."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``residual + drop(input)``, both (..., C); without a residual ``drop(input)``."""
        if self.training and self.p > 0.0:
            return dropout(input, self.p, residual=residual)
        return input if residual is None else residual + input
