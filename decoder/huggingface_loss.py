"""The loss of a causal language model of transformers; without its logits by `huggingface.use(model, fused_loss=True)`.

While the model trains on labels its head hands on the states that it is given, marked with itself, and the loss does
what the head would have done, a chunk of rows at a time. The model's own forward stays in between, whatever it adds.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tileformer.decoder.nn.convert import Report, swap
from tileformer.kernels import cross_entropy, linear_cross_entropy


class LossHead:
    """What `fuse` puts before the class of a head (nn.Linear), which it stays."""

    leads = True
    notes = ("_tileformer_hands_on",)
    _tileformer_hands_on: bool

    def forward(self: Any, x: Tensor) -> Tensor:
        """Logits (..., V); of a model that trains on labels the states x (..., C)."""
        if not self._tileformer_hands_on:
            return super().forward(x)  # type: ignore[misc]
        states: Any = x.view_as(x)
        states.tileformer_head = self
        return states


def fuse(model: nn.Module, part: Any, where: str, report: Report) -> None:
    """Let the loss of ``part``, a causal language model in ``model``, compute what its head does."""
    head = part.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), f"{where}head")
    if getattr(part, "loss_function", None) is not causal_lm_loss:
        report.left[name] = f"{type(part).__name__} has not the loss of a causal language model"
    elif isinstance(head, LossHead):
        report.left[name] = "it is fused with the loss already"
    elif type(head) is not nn.Linear or head.in_features == head.out_features:  # states would look like logits
        report.left[name] = f"the fused loss takes an nn.Linear to another width, not {head}"
    else:
        swap(head, LossHead)
        head._tileformer_hands_on = False  # type: ignore[assignment]
        part.register_forward_pre_hook(_before, with_kwargs=True)
        part.register_forward_hook(_after, with_kwargs=True, always_call=True)
        report.swapped[name] = "torch's Linear and the loss -> tileformer's linear_cross_entropy"


def unfuse(model: Any) -> None:
    """Take the hooks of `fuse` away; the head's class is the matter of `nn.convert.revert`."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_before, _after)]:
            for kind in ("pre_hooks_with_kwargs", "hooks_with_kwargs", "hooks_always_called"):
                getattr(model, f"_forward_{kind}").pop(key, None)
            del hooks[key]


def _before(model: Any, inputs: Any, named: dict[str, Any]) -> None:
    trains = model.training and torch.is_grad_enabled() and named.get("labels") is not None
    model.get_output_embeddings()._tileformer_hands_on = trains


def _after(model: Any, inputs: Any, named: dict[str, Any], output: Any) -> Any:
    """The output without what the head handed on in the place of logits."""
    model.get_output_embeddings()._tileformer_hands_on = False
    if isinstance(output, tuple):
        return tuple(x for x in output if not hasattr(x, "tileformer_head"))
    if output is None:  # the forward failed
        return output
    return type(output)(**{name: None if hasattr(x, "tileformer_head") else x for name, x in output.items()})


def causal_lm_loss(
    logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100, shift_labels: Tensor | None = None, **_: Any,
) -> Tensor:  # fmt: skip
    """Cross-entropy of the next token, as transformers' ``ForCausalLMLoss``, without its float32 copy of the logits."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target = shift_labels.reshape(-1).to(logits.device)
    head = getattr(logits, "tileformer_head", None)
    if head is not None:
        loss = _summed_loss(logits, head, target, ignore_index)
    elif logits.shape[-1] != vocab_size:
        raise NotImplementedError(
            f"{logits.shape[-1]} instead of {vocab_size} logits: under fused_loss=True a model may not change what its "
            "head gives before its loss: revert(model), then use(model)"
        )
    else:
        loss = cross_entropy(logits.reshape(-1, vocab_size), target, ignore_index=ignore_index, reduction="none")
    items = (target != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return loss.sum(dtype=torch.float32) / torch.as_tensor(items, device=loss.device)  # a sum in float16 would overflow


def _summed_loss(states: Tensor, head: Any, target: Tensor, ignore_index: int) -> Tensor:
    """The sum over rows of the losses of the head's logits."""
    half = states.dtype.itemsize == 2  # whose sum would overflow: autocast to what they are gives float32
    given: Any = dict(linear_bias=head.bias, ignore_index=ignore_index, reduction="sum")
    with torch.autocast(states.device.type, states.dtype) if half else contextlib.nullcontext():
        return linear_cross_entropy(states.flatten(0, -2), head.weight, target, **given)
