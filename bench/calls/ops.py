"""What each op is to a check and a benchmark: its tensors, least cost, size of rounding errors, dropout bits.

Costs are an ideal implementation's. FLOPs count what is attended to: not the whole keys that a causal shift or padding
hides, but those that a boolean mask hides here and there, which no kernel can skip. Bytes count each input and output
once; statistics of a few bytes a row are left out. Backward of attention is 2.5 times its forward (five products
instead of two; arXiv:2307.08691, section 3).
"""

import math
from typing import Any

import torch
from torch import Generator, Tensor

from tileformer.bench.calls.op import (
    AFFINE,
    SCALES,
    Cost,
    Op,
    Options,
    Sizes,
    Tensors,
    attended_pairs,
    key_padding,
    normal,
    real_keys,
    uniform,
)
from tileformer.bench.calls.row_ops import ROW_OPS
from tileformer.kernels import reference


def _build_attention(
    generator: Generator, sizes: Sizes, *, mask: str | float = "", padding: str = "", bias: tuple[int, ...] = (),
    lengths: bool = False, packed: tuple[tuple[int, ...], tuple[int, ...]] | None = None, alibi: bool = False,
    dv: int = 0, heads_last: bool = False, lse: bool = False, **options: Any,
) -> tuple[Tensors, Options]:  # fmt: skip
    """q, k, v and `bias`, of that shape.

    Args:
        mask: boolean: "boolean" (and a row that may attend to nothing), "thinned" (no such row); added: "additive" (of
            each batch), "heads" (of each head), "columns"; a number: a causal mask as Hugging Face's models add it,
            that number where a key is hidden, here also all along two rows.
        padding: a kind of `key_padding`.
        lengths: of queries and keys, in each batch.
        packed: the starts of sequences.
        dv: D_v, if it is not D.
        heads_last: store (B, T, H, D).
        lse: return the log-sum-exp too.
    """
    b, h, h_kv, t_q, t_k, d = (sizes[name] for name in ("B", "H", "H_kv", "T_q", "T_k", "D"))
    device = generator.device
    shapes = dict(q=(b, h, t_q, d), k=(b, h_kv, t_k, d), v=(b, h_kv, t_k, dv or d))
    tensors = {name: normal(generator, *shape) for name, shape in shapes.items()}
    if heads_last:
        tensors = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in tensors.items()}
    if lse:
        options["return_lse"] = True
    if mask in ("boolean", "thinned"):
        options["mask"] = uniform(generator, t_q, t_k) > (0.3 if mask == "boolean" else 0.2)
        options["mask"][t_q // 2] &= mask == "thinned"
    elif mask in ("additive", "heads"):
        options["mask"] = normal(generator, *((b, 1) if mask == "additive" else (1, h)), t_q, t_k)
    elif mask == "columns":
        options["mask"] = normal(generator, h, 1, t_k).masked_fill(uniform(generator, h, 1, t_k) < 0.2, -torch.inf)
    elif isinstance(mask, float):
        hidden = torch.ones(t_q, t_k, device=device).triu(1) > 0
        hidden[:2] = True
        options["mask"] = torch.zeros(b, 1, t_q, t_k, device=device).masked_fill(hidden, mask)
    if bias:
        tensors["bias"] = normal(generator, *bias)
    if padding:
        options["key_mask"] = key_padding(padding, b, t_k, device)
    if lengths:  # all, some, none of the queries; one more key each
        options["query_lengths"] = torch.linspace(t_q, 0, b).int()
        options["key_lengths"] = torch.linspace(t_k, 1, b).int()
    if packed:
        options["cu_seqlens_q"], options["cu_seqlens_k"] = (torch.tensor(part, dtype=torch.int32) for part in packed)
    if alibi:
        options["alibi_slopes"] = 2.0 ** -torch.arange(1.0, h + 1)
    if "dropout_p" in options:
        options["seed"] = torch.tensor([0x1234_5678_9ABC], device=device)
    return tensors, options


def _attention_cost(sizes: Sizes, options: Options, item: int) -> Cost:
    b, h, h_kv, t_q, t_k, d = (sizes[name] for name in ("B", "H", "H_kv", "T_q", "T_k", "D"))
    query, keys = b * h * t_q * d, 2 * b * h_kv * t_k * d
    real = 2 * h_kv * d * sum(real_keys(sizes, options))  # keys and values that are not padding
    sides = {"thinned": t_q * t_k, "heads": item * h * t_q * t_k}.get(options.get("mask", ""), 0)
    sides += b * t_k if "padding" in options else 0
    product = 2 * attended_pairs(sizes, options) * d
    forward, backward = 2 * query + real, 4 * query + real + keys
    return Cost((item * forward + sides, item * backward + sides), (2 * product, 5 * product))


def attention_sizes(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, dlse: Tensor | None = None, **options: Any
) -> dict[str, Tensor | float]:
    """S of each result, R of each gradient as "dq again" (bench/check/budget.py): sums of the terms' absolute values.

    With P the weights and M their dropout (0 or 1 / (1 - p)): dS is at most P (M |dO| |V|^T + rowsum|dO O| + |dlse|).
    """
    (b, h, _, d), h_kv, t_k = q.shape, k.shape[1], k.shape[2]
    for name in ("return_lse", "return_weights"):
        options.pop(name, None)
    q, k, v = (torch.where(x.isfinite(), x, 0.0) for x in (q, k, v))  # padding may hold anything
    identity = torch.eye(t_k, dtype=q.dtype, device=q.device).expand(b, h_kv, t_k, t_k)
    dropped = reference.attention(q, k, identity, **options)
    weights = reference.attention(q, k, identity, **(options | dict(dropout_p=0.0)))
    scale = d**-0.5 if options.get("scale") is None else abs(options["scale"])
    key, value = (x.abs().repeat_interleave(h // h_kv, 1) for x in (k, v))
    delta = (out * dout).abs().sum(-1, keepdim=True) + (0 if dlse is None else dlse.abs()[..., None])
    ds = dropped * (dout.abs() @ value.transpose(-1, -2)) + weights * delta
    scores = scale * (q.abs() @ key.transpose(-1, -2))
    for added in (options.get("mask"), bias := options.get("bias")):
        if added is not None and added.dtype != torch.bool:
            scores = scores + torch.where(added.isfinite(), added.abs(), 0.0)
    shared = lambda x: x.unflatten(1, (h_kv, h // h_kv)).sum(2)  # noqa: E731

    def gradients(ds: Tensor, dropped: Tensor) -> dict[str, Tensor | float]:
        dk, dv = shared(ds.transpose(-1, -2) @ q.abs()), shared(dropped.transpose(-1, -2) @ dout.abs())
        dbias = 0.0 if bias is None else ds.sum_to_size(bias.shape)
        return dict(dq=scale * ds @ key, dk=scale * dk, dv=dv, dbias=dbias)

    again = {f"{name} again": x for name, x in gradients(ds * scores, dropped * scores).items()}
    return dict(out=dropped @ value, lse=scores.amax(-1) if t_k else 0.0, **gradients(ds, dropped), **again)


def _attention_draw(op: Any, p: float, seed: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Equal scores over n keys and v = n I make the output the dropped weights; dv for dO = I is their transpose."""
    b, h, n = 2, 2, 64
    identity = torch.eye(n, dtype=like.dtype, device=like.device).expand(b, h, n, n).contiguous()
    zeros = torch.zeros_like(identity)
    v = (n * identity).requires_grad_()
    out = op(zeros, zeros, v, dropout_p=p, seed=seed)
    (dv,) = torch.autograd.grad(out, v, identity)
    return out.detach(), n * dv.transpose(-1, -2)


def _filled(kind: str, b: int, t_k: int, device: torch.device) -> Tensor:
    """int32 (B,): "full", "ragged" (T_k to a quarter of it), "empty" (ragged, and the last has no key)."""
    lengths = torch.linspace(t_k, t_k if kind == "full" else max(1, t_k // 4), b, device=device).int()
    if kind == "empty":
        lengths[-1] = 0
    return lengths


def paged(x: Tensor, table: Tensor, page: int) -> Tensor:
    """A cache (B, H_kv, T_k, D) as pages (pages, page, H_kv, D), where the table says; NaN elsewhere."""
    shape = table.numel() + 1, page, x.shape[1], x.shape[3]
    pages = x.new_full(shape, math.nan) if x.is_floating_point() else x.new_zeros(shape)
    pages[table.long()] = x.transpose(1, 2).unflatten(1, (-1, page))
    return pages


def _build_decode(
    generator: Generator, sizes: Sizes, *, lengths: str = "ragged", page: int = 0, beams: int = 1, words: bool = False,
    starts: bool = False, bias: str = "", dv: int = 0, int8: bool = False, lse: bool = False, **options: Any,
) -> tuple[Tensors, Options]:  # fmt: skip
    """q, k and v, with NaN in every slot that no query may read.

    Args:
        lengths: a kind of `_filled`.
        page: slots of a page, which divides T_k; 0 for contiguous caches.
        words: which beams descend from a slot, at random; every fifth slot is dead.
        starts: the first fifth of each row is padding.
        bias: "columns" and "full" (with -inf in some columns), or "heads".
        int8: k and v in 8 bits, the scales of neighbours a hundred times apart, v's below float16's normal range.
    """
    b, h, h_kv, t_q, t_k, d = (sizes[name] for name in ("B", "H", "H_kv", "T_q", "T_k", "D"))
    device = generator.device
    options |= dict(lengths=_filled(lengths, b, t_k, device), beams=beams)
    slot = torch.arange(t_k, device=device)
    read = slot < options["lengths"][:, None]
    if starts:
        options["starts"] = options["lengths"] // 5
        read = read & (slot >= options["starts"][:, None])
    if words:
        drawn = torch.randint(1 << beams, (b, t_k), generator=generator, device=device)
        options["descends"] = drawn.masked_fill(slot % 5 == 2, 0).int()
        read = read & (options["descends"] != 0)
    if bias:
        shape = dict(columns=(t_k,), heads=(h, 1, 1)).get(bias, (b * beams, h, t_q, t_k))
        options["bias"] = normal(generator, *shape)
        if bias != "heads":
            options["bias"].masked_fill_(slot % 7 == 3, -math.inf)
    if lse:
        options["return_lse"] = True
    tensors = dict(q=normal(generator, b * beams, h, t_q, d))
    unread = ~read[:, None, :, None]
    for name, size in (("k", d), ("v", dv or d)):
        tensors[name] = normal(generator, b, h_kv, t_k, size).masked_fill(unread, math.nan)
        if int8:
            drawn = torch.randint(-127, 128, tensors[name].shape, generator=generator, device=device)
            scales = uniform(generator, b, h_kv, t_k) * 0.01 ** (slot % 2) / (2**6 if name == "k" else 2**16)
            tensors[name] = drawn.to(torch.int8)
            options[f"{name}_scale"] = scales.masked_fill(~read[:, None], math.nan)
    if page:
        table = torch.randperm(b * t_k // page, generator=generator, device=device).view(b, t_k // page)
        tensors |= {name: paged(tensors[name], table, page) for name in "kv"}
        for name in SCALES if int8 else ():
            options[name] = paged(options[name][..., None], table, page)[..., 0]
        unreached = torch.arange(t_k // page, device=device) * page >= options["lengths"][:, None]
        options["page_table"] = table.masked_fill(unreached, -1).int()
    return tensors, options


def _decode_cost(sizes: Sizes, options: Options, item: int) -> Cost:
    """q and the filled slots -> out; of pages no more than that."""
    b, h, h_kv, t_q, t_k, d = (sizes[name] for name in ("B", "H", "H_kv", "T_q", "T_k", "D"))
    rows, slots = (
        b * options.get("beams", 1) * h * t_q,
        _filled(options.get("lengths", "ragged"), b, t_k, torch.device("cpu")),
    )
    pairs = int(slots.sum()) * rows // b
    key = d + 4 if options.get("int8") else item * d
    return Cost((item * 2 * rows * d + 2 * h_kv * key * int(slots.sum()), 0), (4 * pairs * d, 0))


def _build_append(generator: Generator, sizes: Sizes, **options: Any) -> tuple[Tensors, Options]:
    """The newest tokens, and the caches of `_build_decode`."""
    (caches, others), (b, h_kv, t_q, d) = _build_decode(generator, sizes, **options), _decode_new(sizes)
    new = {name: normal(generator, b * options.get("beams", 1), h_kv, t_q, d) for name in "kv"}
    return new, dict(k_cache=caches["k"], v_cache=caches["v"], **others)


def _decode_new(sizes: Sizes) -> tuple[int, ...]:
    return tuple(sizes[name] for name in ("B", "H_kv", "T_q", "D"))


def _append_cost(sizes: Sizes, options: Options, item: int) -> Cost:
    return Cost((4 * item * math.prod(_decode_new(sizes)) * options.get("beams", 1), 0))


def _decode_error_sizes(tensors: Tensors, options: Options, results: Tensors, grads: Tensors) -> Tensors:
    """The weights times |v|; a score adds up |q| |k|."""
    q, k, v = (tensors[name] for name in "qkv")
    weighed = reference.decode_attention(q, k, v.abs(), **(options | dict(return_lse=False)))
    bias, scale = options.get("bias"), options.get("scale")
    largest = options | dict(
        return_lse=True, softcap=None, scale=None if scale is None else abs(scale),
        bias=None if bias is None else torch.where(bias.isfinite(), bias.abs(), bias),
    )  # fmt: skip
    return dict(out=weighed, lse=reference.decode_attention(q.abs(), k.abs(), v, **largest)[1])


def _layer_shapes(s: Sizes) -> dict[str, tuple[int, ...]]:
    """Of x, memory and the parameters by their names in the state_dict."""
    c, f = s["C"], s["F"]
    shapes: dict[str, tuple[int, ...]] = dict(x=(s["B"], s["T_q"], c), memory=(s["B"], s["T_k"], c))
    for block in ("self_attn", "multihead_attn"):
        shapes |= {f"{block}.in_proj_weight": (3 * c, c), f"{block}.in_proj_bias": (3 * c,)}
        shapes |= {f"{block}.out_proj.weight": (c, c), f"{block}.out_proj.bias": (c,)}
    shapes |= {"linear1.weight": (f, c), "linear1.bias": (f,), "linear2.weight": (c, f), "linear2.bias": (c,)}
    return shapes | {f"norm{n}.{kind}": (c,) for n in (1, 2, 3) for kind in AFFINE}


def _build_layer(generator: Generator, sizes: Sizes, *, padding: str = "", **options: Any) -> tuple[Tensors, Options]:
    tensors = {
        name: normal(generator, *shape) * (shape[-1] ** -0.5 if len(shape) == 2 else 1.0)
        for name, shape in _layer_shapes(sizes).items()
    }
    if padding:
        options["key_mask"] = key_padding(padding, sizes["B"], sizes["T_k"], generator.device)
    return tensors, options


def _layer_cost(sizes: Sizes, options: Options, item: int) -> Cost:
    """Inputs and parameters -> y;  these and dy -> their gradients."""
    c, target, memory = sizes["C"], sizes["B"] * sizes["T_q"], sizes["B"] * sizes["T_k"]
    everything, x = sum(math.prod(shape) for shape in _layer_shapes(sizes).values()), target * c
    crossed = attended_pairs(sizes, options | dict(causal=False))
    itself = {name: option for name, option in options.items() if name != "padding"}
    pairs = crossed + attended_pairs({**sizes, "T_k": sizes["T_q"]}, itself)
    weights = (6 * target + 2 * memory) * c**2 + 2 * target * c * sizes["F"]  # multiply-adds of the linear maps
    product = 2 * pairs * (c // sizes["H"])
    flops = (2 * weights + 2 * product, 4 * weights + 5 * product)
    return Cost((item * (everything + x), item * (2 * everything + x)), flops)


OPS = {
    "attention": Op(
        ("B H H_kv T_q T_k D",), _build_attention, _attention_cost,
        lambda tensors, options, results, grads: attention_sizes(
            **tensors, **options, out=results["out"], dout=grads["out"], dlse=grads.get("lse")
        ),
        _attention_draw,
    ),
    "decode_attention": Op(
        ("B H H_kv T_q T_k D",), _build_decode, _decode_cost, _decode_error_sizes, differentiable=False
    ),
    "append_kv_cache": Op(("B H H_kv T_q T_k D",), _build_append, _append_cost, differentiable=False),
    **ROW_OPS,
    "decoder_layer": Op(("B T_q T_k C H F",), _build_layer, _layer_cost),
}  # fmt: skip
