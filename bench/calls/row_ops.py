"""The ops on rows: norms, softmax and its logarithm, cross-entropy, dropout, activations, rotary. See ops.py."""

import functools
import math
from typing import Any

import torch
from torch import Generator, Tensor

from tileformer.bench.calls.op import Cost, Op, Options, Sizes, Tensors, attended_pairs, largest, normal, uniform


def _build_rows(
    generator: Generator, sizes: Sizes, *, params: tuple[str, ...] = (), mask: str = "", axes: int = 0, **options: Any
) -> tuple[Tensors, Options]:
    """x and `params`: differentiable, of one row ("residual", "up": of x's shape). A norm is over the last `axes`."""
    shape = tuple(sizes.values())
    tensors = {"x": 2 * normal(generator, *shape)}
    for param in params:
        tensors[param] = normal(generator, *(shape if param in ("residual", "up") else shape[-1:]))
    if axes:
        options["normalized_shape"] = shape[-axes:]
    if mask == "boolean":
        options["mask"] = uniform(generator, *shape[-2:]) > 0.3
        options["mask"][0] = False
    if mask == "additive":
        options["mask"] = normal(generator, *shape[-2:])
    if "p" in options:
        options["seed"] = torch.tensor([77], device=generator.device)
    return tensors, options


def _norm_cost(sizes: Sizes, options: Options, item: int) -> Cost:
    """x, parameters -> y;  x, dy, weight -> dx and the parameters' gradients."""
    x, row, params = math.prod(sizes.values()), sizes["N"], len(options.get("params", ()))
    return Cost((item * (2 * x + params * row), item * (3 * x + (1 + params) * row)))


def _norm_error_sizes(tensors: Tensors, options: Options, results: Tensors, grads: Tensors, centre: bool) -> Tensors:
    axes = tuple(range(-len(options["normalized_shape"]), 0))
    x, grad = tensors["x"], grads["out"].abs()
    mean = x.mean(axes, keepdim=True) if centre else x.new_zeros(())
    rstd = ((x - mean).square().mean(axes, keepdim=True) + options.get("eps", 1e-5)).rsqrt()
    xhat = (x.abs() + mean.abs()) * rstd
    weight, rows = tensors.get("weight", x.new_ones(())).abs(), tuple(range(x.dim() + axes[0]))
    g = grad * weight
    return dict(
        out=xhat * weight + tensors.get("bias", x.new_zeros(())).abs(),
        dx=rstd * (g + centre * g.mean(axes, keepdim=True) + xhat * (g * xhat).mean(axes, keepdim=True)),
        dweight=(grad * xhat).sum(rows),
        dbias=grad.sum(rows),
    )


def _softmax_cost(sizes: Sizes, options: Options, item: int) -> Cost:
    """What is hidden need not be read, but is written."""
    x = math.prod(sizes.values())
    seen = attended_pairs(sizes, options) if "causal" in options else x
    return Cost((item * (seen + x), item * (2 * seen + x)))


def _softmax_error_sizes(tensors: Tensors, options: Options, results: Tensors, grads: Tensors) -> Tensors:
    y, grad = results["out"], grads["out"].abs()
    return dict(dx=abs(options.get("scale", 1.0)) * y * (grad + (y * grad).sum(-1, keepdim=True)))


def _log_softmax_error_sizes(tensors: Tensors, options: Options, results: Tensors, grads: Tensors) -> Tensors:
    y, grad, scale = results["out"], grads["out"].abs(), abs(options.get("scale", 1.0))
    top = largest((scale * tensors["x"]).nan_to_num(0.0, 0.0, 0.0))
    # The output is a score minus a sum of about its size; the gradient reads the output, as rounded.
    total = grad + y.exp() * grad.sum(-1, keepdim=True) * (1 + top)
    return dict(out=2 * top + y.abs().nan_to_num(0.0, 0.0, 0.0), dx=scale * total)


def _dropout_cost(sizes: Sizes, options: Options, item: int) -> Cost:
    """x, residual -> y;  dy -> dx (the residual's gradient is dy itself)."""
    return Cost((3 * item * math.prod(sizes.values()), 2 * item * math.prod(sizes.values())))


def _activation_cost(sizes: Sizes, options: Options, item: int) -> Cost:
    """x, bias, up -> y;  dy, x, bias, up -> dx and the gradients of the others."""
    x, up, bias = math.prod(sizes.values()), "up" in options.get("params", ()), "bias" in options.get("params", ())
    row = bias * sizes["N"]
    return Cost((item * ((2 + up) * x + row), item * ((3 + 2 * up) * x + 2 * row)))


def _activation_error_sizes(tensors: Tensors, options: Options, results: Tensors, grads: Tensors) -> Tensors:
    """The slope of an activation is at most 1.13."""
    dx = 1.13 * grads["out"].abs() * tensors.get("up", grads["out"].new_ones(())).abs()
    dx = dx / (1 - options["p"]) if 0.0 < options.get("p", 0.0) < 1.0 else dx
    return dict(dx=dx, dbias=dx.flatten(0, -2).sum(0))


def _dropout_draw(op: Any, p: float, seed: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor of ones shows its own factors; so does its gradient."""
    x = like.new_ones(256, 128).requires_grad_()
    out = op(x, p, seed=seed)
    (dx,) = torch.autograd.grad(out, x, torch.ones_like(out))
    return out.detach(), dx


def _build_cross_entropy(
    generator: Generator, sizes: Sizes, *, weighted: bool = False, ignored: int = 0, **options: Any
) -> tuple[Tensors, Options]:
    """logits, target and maybe a weight of each class; the first `ignored` rows are."""
    rows, classes = sizes["R"], sizes["V"]
    logits = 3 * normal(generator, rows, classes)
    options["target"] = torch.randint(classes, (rows,), generator=generator, device=generator.device)
    options["target"][:ignored] = -100
    if weighted:
        options["weight"] = uniform(generator, classes) + 0.1
    return dict(logits=logits), options


def _cross_entropy_cost(sizes: Sizes, options: Options, item: int) -> Cost:
    """Forward and backward need one read and one write together."""
    logits, targets = item * sizes["R"] * sizes["V"], 8 * sizes["R"]
    return Cost((logits + targets, 2 * logits + targets), both=2 * logits + targets)


def _build_rotary(
    generator: Generator, sizes: Sizes, *, rotated: int = 0, own_positions: bool = False, heads_last: bool = False,
    **options: Any,
) -> tuple[Tensors, Options]:  # fmt: skip
    """x, of which the first `rotated` elements turn (0: all), and tables, of each batch with `own_positions`."""
    b, h, t, d = sizes.values()
    x = normal(generator, b, t, h, d).transpose(1, 2) if heads_last else normal(generator, b, h, t, d)
    angle = 6.3 * uniform(generator, *([b] if own_positions else []), t, (rotated or d) // 2)
    return dict(x=x), dict(cos=angle.cos(), sin=angle.sin(), **options)


def _rotary_cost(sizes: Sizes, options: Options, item: int) -> Cost:
    """x -> y;  dy -> dx. The tables are shared by heads."""
    return Cost((2 * item * math.prod(sizes.values()),) * 2)


ROWS = ("N", "R N", "B R N", "B H T_q T_k")
ROW_OPS = {
    "layer_norm": Op(ROWS, _build_rows, _norm_cost, functools.partial(_norm_error_sizes, centre=True)),
    "rms_norm": Op(ROWS, _build_rows, _norm_cost, functools.partial(_norm_error_sizes, centre=False)),
    "softmax": Op(ROWS, _build_rows, _softmax_cost, _softmax_error_sizes),
    "log_softmax": Op(ROWS, _build_rows, _softmax_cost, _log_softmax_error_sizes),
    "cross_entropy": Op(
        ("R V",), _build_cross_entropy, _cross_entropy_cost,
        lambda tensors, _, results, grads: dict(out=largest(results["out"]) + largest(tensors["logits"])),
    ),
    "bias_activation_dropout": Op(ROWS, _build_rows, _activation_cost, _activation_error_sizes),
    "rotary": Op(("B H T_q D",), _build_rotary, _rotary_cost),
    "dropout": Op(ROWS, _build_rows, _dropout_cost, draw=_dropout_draw),
}  # fmt: skip
