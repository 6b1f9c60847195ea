"""Every op on arguments that nobody chose: forward and every gradient, through the interpreted kernels, within the error budget.

A plain run takes the same few examples each time. `make fuzz` (`pytest tests/test_fuzz.py --fuzz N`) takes N new ones for each op and prints
the seed that repeats them. A failing example is printed as it was drawn: shrinking one takes minutes of interpretation, so that is left to you.
"""

import contextlib
import importlib
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tileformer import kernels
from tileformer.bench.budget import assert_within_budget, attention_sizes
from tileformer.bench.cases import DTYPES, Case
from tileformer.bench.check import results
from tileformer.kernels import scaled_dot_product_attention, use_backend

pytestmark = pytest.mark.interprets
CPU = torch.device("cpu")
ROOMS = {
    name: importlib.import_module(f"tileformer.kernels.{name}")
    for name in ("attention", "layer_norm", "softmax", "cross_entropy", "dropout")
}
LIMITS = {
    "layer_norm": ("MAX_FWD", "MAX_BWD"),
    "softmax": ("MAX_FWD", "MAX_BWD"),
    "cross_entropy": ("MAX_TILE",),
    "dropout": ("MAX_TILE",),
}
dtypes = st.sampled_from(list(DTYPES))
layouts = st.sampled_from(["plain", "plain", "axes swapped", "rows apart", "columns apart", "repeated", "misaligned"])
seeds = st.integers(0, 2**31 - 1)
limits = st.sampled_from([None, None, 8, 32])  # the longest row that one tile may hold: longer ones are looped over


def laid_out(x, how):
    """The same shape, and other strides; "repeated" also other numbers."""
    if how == "axes swapped" and x.dim() > 1:
        return x.transpose(0, -2).contiguous().transpose(0, -2)
    if how == "rows apart" and x.dim() > 1:
        return torch.cat([x, x + 1], -1)[..., : x.shape[-1]]
    if how == "columns apart":
        return torch.stack([x, x + 1], -1)[..., 0]
    if how == "repeated" and x.dim() > 1:
        return x[:1].expand(x.shape)
    if how == "misaligned":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return x


@contextlib.contextmanager
def tiles(op, limit):
    """Let an op of rows hold at most `limit` elements of a row at once."""
    with contextlib.ExitStack() as stack:
        for name in LIMITS[op] if limit else ():
            stack.enter_context(mock.patch.object(ROOMS[op], name, limit))
        yield


def hold(op, build, dtype, size):
    """`size(truth, tensors, options)`: for each result, the sum of the absolute values of what is added up (bench/budget.py)."""
    case, dtype = Case(op, "fuzz", "drawn", build), DTYPES[dtype]
    truth = results(kernels.reference, case, torch.float64, CPU, dtype)
    eager = results(kernels.reference, case, dtype, CPU, dtype)
    if "lse" in eager:  # float32 for every input dtype, so its yardstick is too
        eager["lse"] = results(kernels.reference, case, torch.float32, CPU, dtype)["lse"]
    with use_backend("interpret"):
        got = results(kernels, case, dtype, CPU, dtype)
    wide = lambda x: x.to(dtype).double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x  # noqa: E731
    tensors, options = ({name: wide(x) for name, x in group.items()} for group in case.inputs())
    for name, most in size({name: x.detach() for name, x in truth.items()}, tensors, options).items():
        assert_within_budget(name, got[name], eager[name], truth[name], most)


def top(x):
    """The largest absolute value, infinities apart."""
    return float(x[x.isfinite()].abs().max()) if x.isfinite().any() else 0.0


def mask_of(kind, shape, how, generator):
    """A boolean or additive mask of `shape`; an additive one hides some keys too."""
    hidden = torch.rand(shape, generator=generator) < 0.3
    if kind == "boolean":
        return laid_out(~hidden, how if how != "rows apart" and how != "columns apart" else "plain")
    return laid_out(torch.randn(shape, generator=generator).masked_fill(hidden, -torch.inf), how)


@st.composite
def broadcast_masks(draw, shape):
    """None, or (kind, a shape that broadcasts to `shape`, a layout)."""
    kind = draw(st.sampled_from([None, None, "boolean", "additive"]))
    sizes = [draw(st.sampled_from([1, n, n])) for n in shape]
    drop = draw(st.integers(0, len(shape) - 1))
    return None if kind is None else (kind, tuple(sizes[drop:]), draw(layouts))


@st.composite
def attention_calls(draw):
    b, h_kv, group = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    tile = draw(st.sampled_from([(16, 16), (32, 16), (16, 32), (32, 32), (64, 16), (16, 64)]))
    most = 3 if b * h_kv * group <= 4 else 2  # tiles along an axis: interpretation is slow
    t_q, t_k = draw(st.integers(1, min(70, most * tile[0]))), draw(st.integers(1, min(70, most * tile[1])))
    t_k = t_q if draw(st.booleans()) else t_k
    return dict(
        shape=(b, h_kv * group, h_kv, t_q, t_k, draw(st.sampled_from([1, 3, 8, 16, 20, 33]))),
        tile=tile,
        causal=draw(st.sampled_from([False, "top_left", "bottom_right"])),
        mask=draw(broadcast_masks((b, h_kv * group, t_q, t_k))),
        padding=draw(st.sampled_from([None, "right", "left", "holes", "random", "one batch"])),
        p=draw(st.sampled_from([0.0, 0.0, 0.1, 0.5])),
        scale=draw(st.sampled_from([None, None, 0.3, -0.5, 2.0])),
        lse=draw(st.booleans()),
        layouts=draw(st.tuples(layouts, layouts, layouts)),
        seed=draw(seeds),
    )


def key_mask_of(kind, b, t_k, generator):
    at, real = torch.arange(t_k).expand(b, t_k), torch.rand(b, t_k, generator=generator)
    length = 1 + (real[:, :1] * t_k).long()
    return {
        "right": at < length,
        "left": at >= t_k - length,
        "holes": (at % 5 != 2) & (at < length),
        "random": real > 0.5,
        "one batch": torch.arange(b)[:, None].expand(b, t_k) > 0,
    }[kind]


@given(attention_calls(), dtypes)
def test_attention(call, dtype):
    b, h, h_kv, t_q, t_k, d = call["shape"]

    def build(generator):
        generator.manual_seed(call["seed"])
        draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
        drawn = draw(b, h, t_q, d), draw(b, h_kv, t_k, d), draw(b, h_kv, t_k, d)
        leaves = {n: laid_out(x, how) for n, x, how in zip("qkv", drawn, call["layouts"], strict=True)}
        options = dict(causal=call["causal"], return_lse=call["lse"], scale=call["scale"])
        if call["mask"]:
            options["mask"] = mask_of(*call["mask"], generator)
        if call["padding"]:
            options["key_mask"] = key_mask_of(call["padding"], b, t_k, generator)
        if call["p"]:
            options |= dict(dropout_p=call["p"], seed=torch.tensor([call["seed"] << 31]))
        return leaves, options

    def size(truth, tensors, options):
        sizes = attention_sizes(
            **tensors, out=truth["out"], dout=truth["given out"], dlse=truth.get("given lse"), **options
        )
        if not call["lse"]:
            del sizes["lse"]
        elif options.get("mask") is not None and options["mask"].is_floating_point():
            sizes["lse"] = sizes["lse"] + top(options["mask"])
        return sizes

    rows = [dict(BLOCK_M=call["tile"][0], BLOCK_N=call["tile"][1], num_warps=4, num_stages=1)]
    with mock.patch.object(ROOMS["attention"], "tiles_for", lambda *_, **__: rows):
        hold("attention", build, dtype, size)


shapes = st.lists(st.integers(1, 7), max_size=3).map(tuple)
widths = st.one_of(st.integers(1, 70), st.sampled_from([128, 200, 256]))


@given(st.lists(st.integers(1, 7), min_size=1, max_size=3), st.lists(st.integers(2, 70), min_size=1, max_size=2).map(tuple),
       st.sampled_from([(), ("weight",), ("bias",), ("weight", "bias")]), st.sampled_from([1e-5, 1e-2, 1.0]),
       st.sampled_from([0.0, 5.0]), layouts, limits, seeds, dtypes)  # fmt: skip
def test_layer_norm(lead, normalized_shape, params, eps, mean, how, limit, seed, dtype):
    def build(generator):
        generator.manual_seed(seed)
        leaves = {"x": laid_out(torch.randn(*lead, *normalized_shape, generator=generator) + mean, how)}
        leaves |= {name: torch.randn(normalized_shape, generator=generator) for name in params}
        return leaves, dict(normalized_shape=normalized_shape, eps=eps)

    def size(truth, tensors, options):
        axes = tuple(range(-len(normalized_shape), 0))
        x, given = tensors["x"], truth["given out"].abs()
        rstd = top((x.var(axes, unbiased=False) + eps).rsqrt())
        weight, bias = (top(tensors[n]) if n in tensors else default for n, default in (("weight", 1.0), ("bias", 0.0)))
        xhat = rstd * top(x)
        rows = given.flatten(0, len(lead) - 1).sum(0)
        sizes = {"out": weight * xhat + bias, "dx": 3 * rstd * (1 + xhat) * weight * top(given)}
        return sizes | {n: rows.max() * (xhat if n == "dweight" else 1.0) for n in ("dweight", "dbias") if n in truth}

    with tiles("layer_norm", limit):
        hold("layer_norm", build, dtype, size)


@st.composite
def softmax_calls(draw):
    shape = (*draw(shapes), draw(widths))
    return shape, draw(broadcast_masks(shape)), draw(st.sampled_from([False, "top_left", "bottom_right"]))


@given(softmax_calls(), st.sampled_from([1.0, 0.3, -0.7]), layouts, limits, seeds, dtypes)
def test_softmax(call, scale, how, limit, seed, dtype):
    shape, mask, causal = call

    def build(generator):
        generator.manual_seed(seed)
        options = dict(scale=scale, causal=causal if len(shape) > 1 else False)
        leaves = {"x": laid_out(3 * torch.randn(shape, generator=generator), how)}
        return leaves, options | ({"mask": mask_of(*mask, generator)} if mask else {})

    def size(truth, tensors, options):
        out, given = truth["out"], truth["given out"].abs()
        return {"out": out, "dx": abs(scale) * out * (given + (out * given).sum(-1, keepdim=True))}

    with tiles("softmax", limit):
        hold("softmax", build, dtype, size)


@given(st.integers(1, 40), widths, st.sampled_from(["mean", "sum", "none"]), st.sampled_from([0.0, 0.1, 1.0]),
       st.booleans(), st.sampled_from([0.0, 0.3]), st.sampled_from([-100, -1, 0]), layouts, limits, seeds, dtypes)  # fmt: skip
def test_cross_entropy(rows, classes, reduction, smoothing, weighted, ignored, ignore_index, how, limit, seed, dtype):
    def build(generator):
        generator.manual_seed(seed)
        target = torch.randint(classes, (rows,), generator=generator)
        target[torch.rand(rows, generator=generator) < ignored] = ignore_index
        target[-1] = classes - 1  # a mean over nothing is NaN, and said elsewhere
        options = dict(target=target, reduction=reduction, label_smoothing=smoothing)
        options["ignore_index"] = -100 if classes == 1 else ignore_index
        if options["ignore_index"] != ignore_index:
            target.clamp_(min=0)
        if weighted:
            options["weight"] = torch.rand(classes, generator=generator) + 0.1
        return {"logits": laid_out(3 * torch.randn(rows, classes, generator=generator), how)}, options

    def size(truth, tensors, options):
        counted, weight = options["target"] != options["ignore_index"], options.get("weight", torch.ones(classes))
        own = torch.where(counted, weight[options["target"].clamp(min=0)], 0.0)
        share = top(truth["given out"]) / (float(own.sum()) if reduction == "mean" else 1.0)
        loss = 2 * top(tensors["logits"]) * top(weight) * {"mean": 1.0, "sum": rows, "none": 1.0}[reduction]
        return {"out": loss, "dlogits": 2 * top(weight) * share}

    with tiles("cross_entropy", limit):
        hold("cross_entropy", build, dtype, size)


@given(shapes, widths, st.sampled_from([0.1, 0.5, 0.9, 1.0]), st.booleans(), layouts, limits, seeds, dtypes)
def test_dropout(lead, width, p, residual, how, limit, seed, dtype):
    def build(generator):
        generator.manual_seed(seed)
        names = ("x", "residual") if residual else ("x",)
        leaves = {name: laid_out(torch.randn(*lead, width, generator=generator), how) for name in names}
        return leaves, dict(p=p, seed=torch.tensor([seed << 31 | seed]))

    def size(truth, tensors, options):
        return {name: top(x) for name, x in truth.items() if not name.startswith("given")}

    with tiles("dropout", limit):
        hold("dropout", build, dtype, size)


@given(st.lists(st.integers(1, 3), max_size=3).map(tuple), st.integers(1, 3), st.integers(1, 40), st.integers(1, 40),
       st.sampled_from([None, "causal", "boolean", "additive"]), st.sampled_from([None, 0.4]), st.data(), seeds)  # fmt: skip
def test_torchs_signature(lead, group, t_q, t_k, masked, scale, data, seed):
    generator = torch.Generator().manual_seed(seed)
    heads = (*lead[:-1], lead[-1] * group) if lead else lead
    q, k, v = (torch.randn(*s, 8, generator=generator) for s in ((*heads, t_q), (*lead, t_k), (*lead, t_k)))
    options = dict(scale=scale, is_causal=masked == "causal", enable_gqa=len(lead) >= 1 and group > 1)
    if masked in ("boolean", "additive"):
        sizes = [data.draw(st.sampled_from([1, n])) for n in (*heads, t_q, t_k)]
        mask = mask_of(masked, tuple(sizes[data.draw(st.integers(0, len(heads))) :]), "plain", generator)
        mask[..., 0] = True if masked == "boolean" else 0.0  # torch gives NaN in a row that sees nothing
        options["attn_mask"] = mask
    wide = {n: o.double() if masked == "additive" and n == "attn_mask" else o for n, o in options.items()}
    repeat = group if options.pop("enable_gqa") and wide.pop("enable_gqa") else 1
    expected = [k.double(), v.double()]
    expected = [x.repeat_interleave(repeat, -3) if repeat > 1 else x for x in expected]
    wide.pop("enable_gqa", None)
    truth = torch.nn.functional.scaled_dot_product_attention(q.double(), *expected, **wide)
    with use_backend("interpret"):
        out = scaled_dot_product_attention(q, k, v, **options, enable_gqa=repeat > 1)
    assert_within_budget("out", out, truth.float(), truth, 4 * top(v))
