"""What is timed: one list of calls with the bytes and FLOPs an ideal implementation needs. A new op joins every benchmark by adding entries here.

Conventions. FLOPs count what is attended to: a causal shift or padding hides whole keys, which a kernel can skip, and they do not count; a boolean
mask hides keys here and there, which none can skip, and they do. Bytes count each input read once and each output written once; statistics
of a few bytes a row are left out. Backward of attention is 2.5 times its forward (five products instead of two; arXiv:2307.08691, section 3).
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any

import torch
from torch import Tensor

MODES = ("forward", "backward", "both")
DROPOUT_NAMES = ("dropout_p", "p", "dropout")  # what the ops call the rate


@dataclasses.dataclass(frozen=True, eq=False)
class Workload:
    """One call of an op.

    Args:
        op: name of the public op, or "decoder_layer".
        name: unique within the op.
        sizes: attention: B, H, H_kv, T_q, T_k, D; softmax: R, N, or B, H, T_q, T_k; layer_norm, dropout: R, N; cross_entropy: R, V;
            decoder_layer: B, T_q, T_k, C, H, F.
        options: the op's plain keyword arguments.
        masks: tensor options to make: {"mask": "boolean" | "bias"}, {"key_mask": "right"}.
        axis: the size that a plot has on its x-axis, if this belongs to a sweep over it; the curve's name is `name` without it.
        modes: which passes are timed.
    """

    op: str
    name: str
    sizes: dict[str, int]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    masks: dict[str, str] = dataclasses.field(default_factory=dict)
    axis: str = ""
    modes: tuple[str, ...] = MODES

    @property
    def curve(self) -> str:
        """Name of the sweep that this is a point of."""
        return self.name.rsplit(" ", 2)[0]

    @property
    def dropout(self) -> float:
        """Rate of dropout, 0.0 if there is none."""
        return max((self.options.get(name, 0.0) for name in DROPOUT_NAMES), default=0.0)

    def without_dropout(self) -> Workload:
        """The same call with a rate of 0: what providers with different random bits agree on."""
        return dataclasses.replace(self, options={n: 0.0 if n in DROPOUT_NAMES else x for n, x in self.options.items()})

    def small(self, scale: int = 1) -> Workload:
        """The same call at a size that a CPU takes in milliseconds: fewer batches, heads, rows and keys, same D, N, V and feature."""
        most = dict(B=2, R=8 * scale**2, T_q=64 * scale, T_k=64 * scale, F=256 * scale, C=128 * scale)
        sizes = {name: min(size, most.get(name, size)) for name, size in self.sizes.items()}
        if "H" in sizes:
            group = self.sizes["H"] // self.sizes.get("H_kv", self.sizes["H"])
            sizes["H"] = max(group, 2)
            if "H_kv" in sizes:
                sizes["H_kv"] = sizes["H"] // group
        return dataclasses.replace(self, sizes=sizes)

    def lengths(self) -> list[int]:
        """Real keys of each batch: T_k, or with padding evenly spaced from T_k down to a quarter of it."""
        b, t_k = self.sizes["B"], self.sizes["T_k"]
        if "key_mask" not in self.masks:
            return [t_k] * b
        return [max(1, t_k - (t_k - t_k // 4) * n // max(b - 1, 1)) for n in range(b)]

    def inputs(self, device: torch.device | str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors to differentiate, and the other arguments; the same numbers in every process on a kind of device."""
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{self.op} {self.name}".encode()))
        shapes = self._shapes()

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)

        def scaled(name: str, shape: tuple[int, ...]) -> Tensor:
            if self.op == "decoder_layer" and len(shape) == 2:
                return draw(*shape) * shape[-1] ** -0.5
            return draw(*shape) * {"logits": 3.0, "weight": 0.5}.get(name, 1.0)

        tensors = {name: scaled(name, shape).to(dtype) for name, shape in shapes.items()}
        more = dict(self.options)
        scores = [self.sizes.get("H", 1), self.sizes.get("T_q", 1), self.sizes.get("T_k", 1)]
        if self.masks.get("mask") == "boolean":
            more["mask"] = torch.rand(scores[1:], generator=generator, device=device) > 0.2
        if self.masks.get("mask") == "bias":
            more["mask"] = draw(1, *scores).to(dtype)
        if "key_mask" in self.masks:
            length = torch.tensor(self.lengths(), device=device)
            more["key_mask"] = torch.arange(self.sizes["T_k"], device=device) < length[:, None]
        if self.op == "cross_entropy":
            r, v = self.sizes["R"], self.sizes["V"]
            more["target"] = torch.randint(v, (r,), generator=generator, device=device)
        if self.dropout and self.op != "decoder_layer":
            more["seed"] = torch.tensor([0x1234_5678_9ABC], device=device)
        return tensors, more

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        s = self.sizes
        if self.op == "attention":
            key = (s["B"], s["H_kv"], s["T_k"], s["D"])
            return dict(q=(s["B"], s["H"], s["T_q"], s["D"]), k=key, v=key)
        if self.op == "decoder_layer":
            c, f = s["C"], s["F"]
            shapes: dict[str, tuple[int, ...]] = dict(x=(s["B"], s["T_q"], c), memory=(s["B"], s["T_k"], c))
            for block in ("self_attn", "multihead_attn"):
                shapes |= {f"{block}.in_proj_weight": (3 * c, c), f"{block}.in_proj_bias": (3 * c,)}
                shapes |= {f"{block}.out_proj.weight": (c, c), f"{block}.out_proj.bias": (c,)}
            shapes |= {"linear1.weight": (f, c), "linear1.bias": (f,), "linear2.weight": (c, f), "linear2.bias": (c,)}
            return shapes | {f"norm{n}.{kind}": (c,) for n in (1, 2, 3) for kind in ("weight", "bias")}
        if self.op == "cross_entropy":
            return dict(logits=(s["R"], s["V"]))
        rows = (s["R"], s["N"]) if "N" in s else (s["B"], s["H"], s["T_q"], s["T_k"])
        if self.op == "layer_norm":
            return dict(x=rows, weight=rows[-1:], bias=rows[-1:])
        if self.op == "rms_norm":
            return dict(x=rows, weight=rows[-1:])
        return dict(x=rows, residual=rows) if self.op == "dropout" else dict(x=rows)

    def pairs(self) -> int:
        """(query, key) pairs that are attended to, over batches and heads."""
        s, shift = self.sizes, self.sizes["T_k"] - self.sizes["T_q"]
        causal = self.options.get("causal", False)
        offset = shift if causal == "bottom_right" else 0
        per_head = 0
        for length in self.lengths():
            if not causal:
                per_head += s["T_q"] * length
            else:  # row i sees min(length, max(0, i + offset + 1)) keys
                first = min(max(0, -offset), s["T_q"])  # the first row that sees a key
                full = min(max(first, length - offset), s["T_q"])  # the first row that sees them all
                per_head += (full - first) * (first + full - 1 + 2 * (offset + 1)) // 2 + (s["T_q"] - full) * length
        return per_head * s["H"]

    def flops(self, mode: str) -> int:
        """Useful FLOPs of the matrix products; 0 for row ops. A multiply-add is two."""
        s = self.sizes
        if self.op not in ("attention", "decoder_layer"):
            return 0
        size = s["D"] if self.op == "attention" else s["C"] // s["H"]
        factor = {"forward": 2, "backward": 5, "both": 7}[mode]
        attended = 2 * factor * self.pairs() * size
        if self.op == "attention":
            return attended
        target, memory = s["B"] * s["T_q"], s["B"] * s["T_k"]
        cross = dataclasses.replace(self, options=self.options | dict(causal=False))
        itself = dataclasses.replace(self, sizes=s | dict(T_k=s["T_q"]), masks={})
        weights = (6 * target + 2 * memory) * s["C"] ** 2 + 2 * target * s["C"] * s[
            "F"
        ]  # multiply-adds of the linear maps
        return 2 * {"forward": 1, "backward": 2, "both": 3}[mode] * weights + 2 * factor * size * (
            itself.pairs() + cross.pairs()
        )

    def bytes(self, dtype: torch.dtype, mode: str) -> int:
        """Least bytes that must move between memory and the chip. Forward and backward of cross-entropy need one read and one write together."""
        numel = {name: math.prod(shape) for name, shape in self._shapes().items()}
        s, item = self.sizes, dtype.itemsize
        everything, sides = sum(numel.values()), 0
        if self.op == "cross_entropy":
            return item * numel["logits"] * {"forward": 1, "backward": 2, "both": 2}[mode] + 8 * s["R"]
        if self.op == "attention":
            real = 2 * s["H_kv"] * s["D"] * sum(self.lengths())  # keys and values that are not padding
            forward, backward = 2 * numel["q"] + real, 4 * numel["q"] + 2 * real + numel["k"] + numel["v"] - real
            sides = {"boolean": s["T_q"] * s["T_k"], "bias": item * s["H"] * s["T_q"] * s["T_k"]}.get(
                self.masks.get("mask", ""), 0
            ) + (s["B"] * s["T_k"] if "key_mask" in self.masks else 0)
        elif self.op == "rms_norm":  # x, weight -> y;  x, dy, weight -> dx, dweight
            forward, backward = everything + numel["x"], 3 * numel["x"] + 2 * s["N"]
        elif self.op == "layer_norm":  # x, weight, bias -> y;  x, dy, weight -> dx, dweight, dbias
            forward, backward = everything + numel["x"], 3 * numel["x"] + 3 * s["N"]
        elif self.op == "dropout":  # x, residual -> y;  dy -> dx (the residual's gradient is dy itself)
            forward, backward = 3 * numel["x"], 2 * numel["x"]
        elif self.op in ("softmax", "log_softmax"):  # what is hidden need not be read, but is written
            seen = numel["x"] if "N" in s else self.pairs()
            forward, backward = seen + numel["x"], 2 * seen + numel["x"]
        else:  # decoder layer: inputs and parameters -> y;  these and dy -> their gradients
            forward, backward = everything + numel["x"], 2 * everything + numel["x"]
        return {"forward": item * forward + sides, "backward": item * backward + sides,
                "both": item * (forward + backward) + 2 * sides}[mode]  # fmt: skip


def _attention(name: str, b: int, h: int, t_q: int, t_k: int, d: int, h_kv: int = 0, **more: Any) -> Workload:
    sizes = dict(B=b, H=h, H_kv=h_kv or h, T_q=t_q, T_k=t_k, D=d)
    fields = {key: more.pop(key) for key in ("masks", "axis", "modes") if key in more}
    return Workload("attention", name, sizes, more, **fields)


def _attention_workloads() -> list[Workload]:
    found = []
    for d in (64, 128):
        h = 2048 // d  # 16,384 tokens of width 2,048, as in arXiv:2307.08691
        for kind, options in (("full", {}), ("causal", dict(causal=True))):
            for t in (512, 1024, 2048, 4096, 8192, 16384):
                found.append(_attention(f"D {d} {kind} T {t}", 16384 // t, h, t, t, d, axis="T_k", **options))
        found += [
            _attention(f"D {d} padded", 8, h, 2048, 2048, d, masks=dict(key_mask="right")),
            _attention(f"D {d} causal padded", 8, h, 2048, 2048, d, masks=dict(key_mask="right"), causal=True),
            _attention(f"D {d} boolean mask", 8, h, 2048, 2048, d, masks=dict(mask="boolean")),
            _attention(f"D {d} bias", 8, h, 2048, 2048, d, masks=dict(mask="bias")),
            _attention(f"D {d} dropout", 2, h // 2, 2048, 2048, d, dropout_p=0.1),
            _attention(f"D {d} GQA 8 causal", 8, h, 2048, 2048, d, h // 8, causal=True),
            _attention(f"D {d} cross", 8, h, 512, 2048, d),
            _attention(f"D {d} decode", 16, h, 1, 4096, d, modes=("forward",)),
            _attention(f"D {d} decode GQA 8", 16, h, 1, 8192, d, h // 8, modes=("forward",)),
        ]
    return found


def _row_workloads() -> list[Workload]:
    found = []
    for n in (256, 1024, 4096, 8192, 16384):
        sizes = dict(R=2**26 // n, N=n)
        found.append(Workload("layer_norm", f"rows N {n}", sizes, dict(normalized_shape=(n,), eps=1e-5), axis="N"))
    for n in (1024, 4096, 8192):
        sizes = dict(R=2**26 // n, N=n)
        found.append(Workload("rms_norm", f"rows N {n}", sizes, dict(normalized_shape=(n,), eps=1e-6), axis="N"))
    for n in (256, 1024, 4096, 8192, 32768):
        found.append(Workload("softmax", f"rows N {n}", dict(R=2**26 // n, N=n), axis="N"))
    found.append(
        Workload("softmax", "causal scores", dict(B=2, H=16, T_q=1024, T_k=1024), dict(causal=True, scale=0.125))
    )
    for v in (4096, 32768):
        found.append(Workload("log_softmax", f"rows N {v}", dict(R=2**26 // v, N=v), axis="N"))
    for v in (4096, 32000, 50257, 131072):
        found.append(Workload("cross_entropy", f"classes V {v}", dict(R=2**27 // v // 8 * 8, V=v), axis="V"))
    found.append(Workload("cross_entropy", "smoothed", dict(R=4096, V=32000), dict(label_smoothing=0.1)))
    for n in (1024, 4096):
        found.append(Workload("dropout", f"residual N {n}", dict(R=2**26 // n, N=n), dict(p=0.1), axis="N"))
    return found


def _layer_workloads() -> list[Workload]:
    shape = dict(B=8, T_q=1024, T_k=1024, C=1024, H=16, F=4096)
    options = dict(causal=True, dropout=0.0, norm_first=True)
    return [
        Workload("decoder_layer", "C 1024", shape, options),
        Workload("decoder_layer", "C 1024 padded", shape, options, dict(key_mask="right")),
        Workload("decoder_layer", "C 1024 dropout", shape, options | dict(dropout=0.1)),
    ]


WORKLOADS: list[Workload] = [*_attention_workloads(), *_row_workloads(), *_layer_workloads()]
OPS = tuple(dict.fromkeys(workload.op for workload in WORKLOADS))
