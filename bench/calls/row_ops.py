"""The ops on rows: norms, softmax, cross-entropy (also of a linear map), dropout, activations, rotary. See ops.py."""

import functools
import math
from typing import Any

import torch
from torch import Generator, Tensor

from tileformer.bench.calls.op import Cost, Op, Options, Sizes, Tensors, attended_pairs, largest, normal, uniform
from tileformer.kernels import reference


def _build_rows(
    generator: Generator, sizes: Sizes, *, params: tuple[str, ...] = (), mask: str = "", axes: int = 0, **options: Any
) -> tuple[Tensors, Options]:
    """x and `params`: differentiable, of one row ("residual", "up": of x's shape). A norm is over the last `axes`."""
    shape = tuple(sizes.values())
    tensors = {"x": 2 * normal(generator, *shape)}
    for param in params:
        # In the order of the op.
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


def _add_norm_cost(sizes: Sizes, options: Options, item: int) -> Cost:
    """x, residual, parameters -> y, total;  total, dy, dtotal, weight -> dx, dresidual (one tensor where nothing is
    dropped), the parameters' gradients."""
    x, row, params = math.prod(sizes.values()), sizes["N"], len(options["params"]) - 1
    backward = (5 if options.get("p") else 4) * x
    return Cost((item * (4 * x + params * row), item * (backward + (1 + params) * row)))


def _add_norm_error_sizes(t: Tensors, options: Options, results: Tensors, grads: Tensors, centre: bool) -> Tensors:
    """Of the norm's; in the backward, what reads the total reads it as rounded."""
    p, first = options.get("p", 0.0), options.get("norm_first", True)
    keep = 1.0 if p == 0.0 else reference.dropout_keep(options["seed"], t["x"].shape, p).double() / (1 - p)
    zero = t["x"].new_zeros(())
    total = t["residual"] + keep * (t["x"] + t.get("x_bias", zero))
    grad = grads["out"].abs() + (0.0 if first else grads["lse"].abs())
    norm = dict(t, x=total), dict(options, normalized_shape=total.shape[-1:])
    sizes = dict(_norm_error_sizes(*norm, results, dict(out=grad), centre))
    mean = total.mean(-1, keepdim=True) if centre else zero
    rstd = ((total - mean).square().mean(-1, keepdim=True) + options.get("eps", 1e-5)).rsqrt()
    xhat, g, off = (total.abs() + mean.abs()) * rstd, grad * t.get("weight", zero + 1).abs(), total.abs() * rstd
    again = rstd * (off * (g * xhat).mean(-1, keepdim=True) + xhat * (g * off).mean(-1, keepdim=True))
    dtotal = sizes.pop("dx") + again + (grads["lse"].abs() if first else 0.0)
    parts = t["residual"].abs() + keep * (t["x"].abs() + t.get("x_bias", zero).abs())
    dx = keep * dtotal
    y = sizes["out"] + parts * rstd * t.get("weight", zero + 1).abs()
    return sizes | dict(
        out=y, lse=parts if first else y, dx=dx, dresidual=dtotal, dx_bias=dx.flatten(0, -2).sum(0),
        dweight=sizes["dweight"] + (grad * off).flatten(0, -2).sum(0),
    )  # fmt: skip


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
    logits = 3 * normal(generator, sizes["R"], sizes["V"])
    return dict(logits=logits), _targets(generator, sizes, weighted, ignored, options)


def _targets(generator: Generator, sizes: Sizes, weighted: bool, ignored: int, options: Options) -> Options:
    rows, classes = sizes["R"], sizes["V"]
    options["target"] = torch.randint(classes, (rows,), generator=generator, device=generator.device)
    options["target"][:ignored] = -100
    if weighted:
        options["weight"] = uniform(generator, classes) + 0.1
    return options


def _cross_entropy_cost(sizes: Sizes, options: Options, item: int) -> Cost:
    """Forward and backward need one read and one write together."""
    logits, targets = item * sizes["R"] * sizes["V"], 8 * sizes["R"]
    return Cost((logits + targets, 2 * logits + targets), both=2 * logits + targets)


def _build_linear_cross_entropy(
    generator: Generator, sizes: Sizes, *, weighted: bool = False, ignored: int = 0, bias: bool = False, **options: Any
) -> tuple[Tensors, Options]:
    """The same of a linear map whose logits have the same spread."""
    rows, width, classes = sizes["R"], sizes["C"], sizes["V"]
    tensors = dict(input=normal(generator, rows, width))
    tensors["linear_weight"] = 3 * width**-0.5 * normal(generator, classes, width)
    if bias:
        tensors["linear_bias"] = normal(generator, classes)
    return tensors, _targets(generator, sizes, weighted, ignored, options)


def _linear_cross_entropy_cost(sizes: Sizes, options: Options, item: int) -> Cost:
    """input, weight, targets -> their gradients; nobody has to store logits."""
    inputs, targets = item * sizes["C"] * (sizes["R"] + sizes["V"]), 8 * sizes["R"]
    product = 2 * sizes["R"] * sizes["C"] * sizes["V"]
    return Cost((inputs + targets, 2 * inputs + targets), (product, 2 * product), both=2 * inputs + targets)


def _linear_cross_entropy_error_sizes(tensors: Tensors, options: Options, results: Tensors, grads: Tensors) -> Tensors:
    """Products of |dlogits|, in whose difference a target's 1 is as large as a row's share of the loss."""
    counted, named = options["target"] != -100, {n: x for n, x in options.items() if n != "target"}
    x, weight = torch.where(counted[:, None], tensors["input"], 0.0), tensors["linear_weight"]
    bias = tensors.get("linear_bias", weight.new_zeros(len(weight)))
    logits = (x @ weight.T + bias).requires_grad_()
    (dlogits,) = torch.autograd.grad(reference.cross_entropy(logits, options["target"], **named), logits, grads["out"])
    y, scores = torch.where(counted, options["target"], 0), x.abs() @ weight.abs().T + bias.abs()
    own = torch.where(counted, options.get("weight", torch.ones_like(bias))[y], 0.0)
    share = grads["out"].abs() / (own.sum() if options.get("reduction", "mean") == "mean" else 1.0)
    d = dlogits.abs().scatter_add(1, y[:, None], (share * own)[:, None])

    def gradients(d: Tensor) -> dict[str, Tensor]:
        return dict(dinput=d @ weight.abs(), dlinear_weight=d.T @ x.abs(), dlinear_bias=d.sum(0))

    again = {f"{name} again": x for name, x in gradients(d * scores).items()}
    return dict(out=results["out"].new_tensor(largest(results["out"]) + largest(scores)), **gradients(d), **again)


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
    "add_layer_norm": Op(ROWS, _build_rows, _add_norm_cost, functools.partial(_add_norm_error_sizes, centre=True)),
    "add_rms_norm": Op(ROWS, _build_rows, _add_norm_cost, functools.partial(_add_norm_error_sizes, centre=False)),
    "softmax": Op(ROWS, _build_rows, _softmax_cost, _softmax_error_sizes),
    "log_softmax": Op(ROWS, _build_rows, _softmax_cost, _log_softmax_error_sizes),
    "cross_entropy": Op(
        ("R V",), _build_cross_entropy, _cross_entropy_cost,
        lambda tensors, _, results, grads: dict(out=largest(results["out"]) + largest(tensors["logits"])),
    ),
    "linear_cross_entropy": Op(
        ("R C V",), _build_linear_cross_entropy, _linear_cross_entropy_cost, _linear_cross_entropy_error_sizes
    ),
    "bias_activation_dropout": Op(ROWS, _build_rows, _activation_cost, _activation_error_sizes),
    "rotary": Op(("B H T_q D",), _build_rotary, _rotary_cost),
    "dropout": Op(ROWS, _build_rows, _dropout_cost, draw=_dropout_draw),
}  # fmt: skip
