"""Every op on arguments that nobody chose: forward and every gradient, through the interpreted kernels, within the
error budget.

A plain run takes the same few examples each time. `make fuzz` (`pytest tests/test_fuzz.py --fuzz N`) takes N new ones
for each op and prints the seed that repeats them. A failing example is printed as it was drawn: shrinking one takes
minutes of interpretation, so that is left to you.
"""

import contextlib
import importlib
import itertools
import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tileformer import kernels
from tileformer.bench.calls import DTYPES, Call
from tileformer.bench.calls.op import SCALES
from tileformer.bench.calls.ops import OPS, attention_sizes
from tileformer.bench.check.budget import assert_within_budget
from tileformer.bench.check.run import results_of
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
    for value in vars(ROOMS[op]).values():  # launches are kept for each shape, with their tiles
        getattr(value, "cache_clear", int)()
    with contextlib.ExitStack() as stack:
        for name in LIMITS[op] if limit else ():
            stack.enter_context(mock.patch.object(ROOMS[op], name, limit))
        yield


def hold(op, build, dtype, size):
    """`size(truth, grads of outputs, tensors, options)`: for each result the sum of the absolute values that are added
    up (check/budget.py)."""
    call = Call(op, "fuzz", build=lambda generator, sizes: build(generator), fp32=SCALES)
    dtype = DTYPES[dtype]
    truth, grads = results_of(kernels.reference, call, torch.float64, CPU, dtype)
    eager, _ = results_of(kernels.reference, call, dtype, CPU, dtype)
    if "lse" in eager:  # float32 for every input dtype, so its yardstick is too
        eager["lse"] = results_of(kernels.reference, call, torch.float32, CPU, dtype)[0]["lse"]
    with use_backend("interpret"):
        got, _ = results_of(kernels, call, dtype, CPU, dtype)
    wide = lambda x: x.to(dtype).double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x  # noqa: E731
    tensors, options = ({name: wide(x) for name, x in group.items()} for group in call.inputs())
    for name, most in size(truth, grads, tensors, options).items():
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
def broadcast_masks(draw, shape, kinds=("boolean", "additive")):
    """None, or (kind, a shape that broadcasts to `shape`, a layout)."""
    kind = draw(st.sampled_from([None, None, *kinds]))
    sizes = [draw(st.sampled_from([1, n, n])) for n in shape]
    drop = draw(st.integers(0, len(shape) - 1))
    return None if kind is None else (kind, tuple(sizes[drop:]), draw(layouts))


@st.composite
def attention_calls(draw):
    """A plain dictionary: what is drawn is what a failure prints. At most three features beside masks, so that each
    meets each other one."""
    b, h_kv, group = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    tile = draw(st.sampled_from([(16, 16, 16), (32, 16, 16), (16, 32, 16), (32, 32, 32), (64, 16, 16), (16, 64, 32)]))
    most = 3 if b * h_kv * group <= 4 else 2  # tiles along an axis: interpretation is slow
    t_q, t_k = draw(st.integers(1, min(70, most * tile[0]))), draw(st.integers(1, min(70, most * tile[1])))
    t_k = t_q if draw(st.booleans()) else t_k
    features = draw(
        st.sets(
            st.sampled_from(["window", "lengths", "packed", "alibi", "softcap", "bias", "value size", "scale", "lse"]),
            max_size=3,
        )
    )
    if "packed" in features:
        b, features = 1, features - {"lengths", "bias"}
    size = draw(st.sampled_from([1, 3, 8, 16, 20, 33]))
    call = dict(
        shape=(b, h_kv * group, h_kv, t_q, t_k, size),
        value_size=draw(st.sampled_from([1, 8, 24, 33])) if "value size" in features else size,
        tile=tile,
        causal=draw(st.sampled_from([False, "top_left", "bottom_right"])),
        mask=draw(
            broadcast_masks(
                (b, h_kv * group, t_q, t_k), ("boolean",) if "bias" in features else ("boolean", "additive")
            )
        ),
        padding=None
        if "packed" in features
        else draw(st.sampled_from([None, "right", "left", "holes", "random", "one batch"])),
        p=draw(st.sampled_from([0.0, 0.0, 0.1, 0.5])),
        scale=draw(st.sampled_from([0.3, -0.5, 2.0])) if "scale" in features else None,
        lse="lse" in features,
        softcap=draw(st.sampled_from([1.0, 20.0])) if "softcap" in features else 0.0,
        layouts=draw(st.tuples(layouts, layouts, layouts)),
        seed=draw(seeds),
    )
    if "window" in features:
        call["window"] = draw(st.tuples(*[st.sampled_from([None, 0, 1, 7, 16, 31])] * 2))
        call["align"] = draw(st.sampled_from([None, "bottom_right"])) if not call["causal"] else None
    if "lengths" in features:
        call["lengths"] = [draw(st.none() | st.lists(st.integers(0, t), min_size=b, max_size=b)) for t in (t_q, t_k)]
    if "packed" in features:
        n = draw(st.integers(1, 3))
        cuts = [sorted(draw(st.lists(st.integers(0, t), min_size=n, max_size=n))) for t in (t_q, t_k)]
        call["packed"], call["longest"] = [[0, *ends] for ends in cuts], draw(st.booleans())
    if "alibi" in features:
        call["alibi"] = draw(st.sampled_from(["a head", "a head of a sequence"]))
    if "bias" in features:
        call["bias"] = tuple(draw(st.sampled_from([1, n, n])) for n in (b, h_kv * group, t_q, t_k))[
            draw(st.integers(0, 3)) :
        ]
    return call


def attention_tiles(m, n, edge):
    """These tiles for every kernel of attention."""
    room = importlib.import_module("tileformer.kernels.attention.launchers")

    def tiles_for(table, *_):
        tile = dict(BLOCK_M=m, BLOCK_N=n, num_warps=4, num_stages=1)
        if table is not room.tiles.BACKWARD_BIAS and table is not room.tiles.WEIGHTS:
            tile["BLOCK_MASKED"] = min(m if table is room.tiles.BACKWARD_DKDV else n, edge)
        return [tile]

    return mock.patch.object(room, "tiles_for", tiles_for)


def attention_arguments(call, generator):
    """(differentiable tensors, other arguments) of a drawn call."""
    b, h, h_kv, t_q, t_k, d = call["shape"]
    generator.manual_seed(call["seed"])
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    drawn = draw(b, h, t_q, d), draw(b, h_kv, t_k, d), draw(b, h_kv, t_k, call["value_size"])
    leaves = {n: laid_out(x, how) for n, x, how in zip("qkv", drawn, call["layouts"], strict=True)}
    options = {n: call[n] for n in ("causal", "scale", "window", "align", "softcap") if call.get(n) is not None}
    if call["mask"]:
        options["mask"] = mask_of(*call["mask"], generator)
    if call["padding"]:
        options["key_mask"] = key_mask_of(call["padding"], b, t_k, generator)
    for name, lengths in zip(("query_lengths", "key_lengths"), call.get("lengths", ()), strict=False):
        options[name] = None if lengths is None else torch.tensor(lengths)
    for name, starts in zip("qk", call.get("packed", ()), strict=False):
        options[f"cu_seqlens_{name}"] = torch.tensor(starts, dtype=torch.int32)
        if call["longest"]:
            options[f"max_seqlen_{name}"] = max(1, max(b - a for a, b in itertools.pairwise(starts)))
    if call.get("alibi"):
        sequences = len(call["packed"][0]) - 1 if "packed" in call else b
        options["alibi_slopes"] = torch.rand((h,) if call["alibi"] == "a head" else (sequences, h), generator=generator)
    if "bias" in call:
        leaves["bias"] = draw(*call["bias"])
    if call["p"]:
        options |= dict(dropout_p=call["p"], seed=torch.tensor([call["seed"] << 31]))
    return leaves, options


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


def attention_size(truth, grads, tensors, options):
    """bench/check/budget.py's, and that of a bias: of the scores' gradient, summed over what the bias broadcasts
    over."""
    given = dict(out=truth["out"], dout=grads["out"], dlse=grads.get("lse"))
    sizes = attention_sizes(**tensors, **given, **options)
    sizes = {name: size for name, size in sizes.items() if name in truth}
    if "bias" in tensors:
        v = tensors["v"].abs().repeat_interleave(tensors["q"].shape[1] // tensors["v"].shape[1], 1)
        scores = (given["dout"].abs() @ v.transpose(-1, -2)).amax() / (1 - options.get("dropout_p", 0.0))
        delta = (given["out"] * given["dout"]).abs().sum(-1).amax() + (
            0 if given["dlse"] is None else given["dlse"].abs().amax()
        )
        rows = math.prod(truth["out"].shape[:3]) / math.prod(
            tensors["bias"].shape[:-1]
        )  # whose weights, each 1 in all, are added up
        sizes["dbias"] = float(scores + delta) * max(1.0, rows)
    return sizes


@given(attention_calls(), dtypes)
def test_attention(call, dtype):
    def build(generator):
        leaves, options = attention_arguments(call, generator)
        return leaves, options | dict(return_lse=call["lse"])

    with attention_tiles(*call["tile"]):
        hold("attention", build, dtype, attention_size)


@given(attention_calls().filter(lambda call: "packed" not in call), st.sampled_from([True, "average"]))
def test_attention_weights(call, kind):
    """Weights on demand, and what they send back to q and k."""
    leaves, options = attention_arguments(call, torch.Generator())

    def found(op, dtype):
        given = {n: x.to(dtype).detach().requires_grad_() for n, x in leaves.items()}
        weights = op(**given, **options, return_weights=kind)[-1]
        total = (weights * torch.linspace(-1, 2, weights.numel()).view(weights.shape).to(dtype)).sum()
        return [weights.detach(), *torch.autograd.grad(total, [given["q"], given["k"]])]

    truth = found(kernels.reference.attention, torch.float64)
    with attention_tiles(*call["tile"]), use_backend("interpret"):
        got = found(kernels.attention, torch.float32)
    for g, e, t in zip(got, found(kernels.reference.attention, torch.float32), truth, strict=True):
        assert_within_budget("weights", g, e, t, 4 * top(t) + 1.0)


@st.composite
def decode_calls(draw):
    """Sizes, and what `_build_decode` (bench/calls/ops.py) takes: at most four features beside lengths."""
    beams, tokens = draw(st.sampled_from([1, 1, 2, 5])), draw(st.sampled_from([1, 1, 2, 7, 16]))
    page = draw(st.sampled_from([0, 0, 16, 24, 32]))
    slots = draw(st.integers(1, 100))
    slots = page * (1 + slots // page) if page else slots
    h_kv, group, size = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 8, 20, 40, 64]))
    sizes = (draw(st.integers(1, 3)), h_kv * group, h_kv, tokens, slots, size)
    kinds = ("words", "starts", "window", "softcap", "bias", "scale", "dv", "source", "int8")
    features = draw(st.sets(st.sampled_from(kinds), max_size=4))
    of = lambda name, *levels: {name: draw(st.sampled_from(levels))} if name in features else {}  # noqa: E731
    options = dict(beams=beams, page=page, lengths=draw(st.sampled_from(["full", "ragged", "empty"])))
    options |= of("words", True) | of("starts", True) | of("window", 0, 5, (9, 3), (None, 2)) | of("softcap", 2.0)
    options |= of("bias", "columns", "full", "heads") | of("scale", -0.4, 1.5) | of("dv", 8, 33) | of("int8", True)
    return sizes, options | dict(causal="source" not in features, lse=True), draw(st.sampled_from([32, 256]))


@given(decode_calls(), seeds, dtypes)
def test_decode_attention(call, seed, dtype):
    sizes, options, least = call
    of_op, room = OPS["decode_attention"], importlib.import_module("tileformer.kernels.attention.decode.launchers")
    named = dict(zip(of_op.axes[0].split(), sizes, strict=True))

    def build(generator):
        return of_op.build(generator.manual_seed(seed), named, **options)

    def size(truth, grads, tensors, options):
        return of_op.error_sizes(tensors, options, truth, grads)

    with mock.patch.object(room, "LEAST_KEYS", least):
        hold("decode_attention", build, dtype, size)


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

    def size(truth, grads, tensors, options):
        axes = tuple(range(-len(normalized_shape), 0))
        x, given = tensors["x"], grads["out"].abs()
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

    def size(truth, grads, tensors, options):
        out, given = truth["out"], grads["out"].abs()
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

    def size(truth, grads, tensors, options):
        counted, weight = options["target"] != options["ignore_index"], options.get("weight", torch.ones(classes))
        own = torch.where(counted, weight[options["target"].clamp(min=0)], 0.0)
        share = top(grads["out"]) / (float(own.sum()) if reduction == "mean" else 1.0)
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

    def size(truth, grads, tensors, options):
        return {name: top(x) for name, x in truth.items()}

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
