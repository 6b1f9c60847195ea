"""LayerNorm, RMSNorm, Dropout, Softmax, LogSoftmax and CrossEntropyLoss: torch.nn's, on our kernels."""

import torch
from torch import Tensor, nn

from tileformer.kernels import cross_entropy, dropout, layer_norm, log_softmax, rms_norm, softmax


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` on the fused kernel: same arguments, parameters and state_dict keys."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last ``len(normalized_shape)`` axes of ``input`` (..., C); the dtype stays."""
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` on the fused kernel: same arguments, parameters and state_dict keys."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last ``len(normalized_shape)`` axes of ``x`` (..., C); the dtype stays."""
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)


class Dropout(nn.Dropout):
    """``torch.nn.Dropout`` on the fused kernel; given a residual, it adds it in the same pass. Never in place."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``residual + drop(input)``, both (..., C); without a residual ``drop(input)``."""
        if input.dim() == 0:  # a number has no rows
            input = self(input[None])[0]
        elif self.training and self.p > 0.0:
            return dropout(input, self.p, residual=residual)
        return input if residual is None else residual + input


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def fuses_residual(dropout: nn.Module) -> bool:
    """Whether a dropout may add a residual in its own pass: it is ours, and nobody has replaced or hooked what it
    does."""
    ours = type(dropout).forward is Dropout.forward and "forward" not in dropout.__dict__
    return ours and not any(getattr(dropout, hooks) for hooks in HOOKS)


class Softmax(nn.Softmax):
    """``torch.nn.Softmax`` on the fused kernel. Along another axis than the last, the input is copied once (of a nested
    tensor, torch computes it)."""

    def forward(self, input: Tensor) -> Tensor:
        """Softmax along ``dim``. Where that is None, torch warns, picks one and computes it; so it does for a single
        element."""
        if self.dim in (-1, input.dim() - 1) and input.dim():
            return softmax(input)
        if self.dim is None or input.dim() == 0 or input.is_nested:
            return super().forward(input)
        return softmax(input.movedim(self.dim, -1)).movedim(-1, self.dim)


class LogSoftmax(nn.LogSoftmax):
    """``torch.nn.LogSoftmax`` on the fused kernel; as `Softmax` along other axes and without a ``dim``."""

    def forward(self, input: Tensor) -> Tensor:
        """Log-softmax along ``dim``."""
        if self.dim in (-1, input.dim() - 1) and input.dim():
            return log_softmax(input)
        if self.dim is None or input.dim() == 0 or input.is_nested:
            return super().forward(input)
        return log_softmax(input.movedim(self.dim, -1)).movedim(-1, self.dim)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss`` on the fused kernel, for targets that are class indices.

    Targets that are class probabilities are computed by torch's own function: there is no kernel for them.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Loss of logits ``input`` (C), (B, C) or (B, C, d1, ...) for classes ``target`` (), (B) or (B, d1, ...).

        Raises ValueError if the shapes do not fit.
        """
        if target.is_floating_point():
            return super().forward(input, target)
        if input.is_nested or target.is_nested:
            raise TypeError(
                "CrossEntropyLoss: nested tensors are not supported: "
                "pass their values (input.values(), target.values())"
            )
        rows = input.movedim(1, -1) if input.dim() > 1 else input
        if rows.shape[:-1] != target.shape:
            raise ValueError(
                f"input {tuple(input.shape)} asks for targets {tuple(rows.shape[:-1])}, one class each; "
                f"target is {tuple(target.shape)}"
            )
        if target.dtype == torch.uint8:
            target = target.long()
        if rows.dim() > 2:
            rows = rows.flatten(0, -2)
        loss = cross_entropy(
            rows,
            target.flatten() if target.dim() else target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,  # type: ignore[arg-type]  # a str in torch: the op refuses other names
            label_smoothing=self.label_smoothing,
        )
        return loss.view(target.shape) if self.reduction == "none" else loss
