"""What is timed: one list of calls. A new op joins every benchmark by adding entries here, and its cost in ops.py."""

from typing import Any

from tileformer.bench.calls import Call, describe
from tileformer.bench.calls.op import AFFINE, SCALES


def _attention_workloads() -> list[Call]:
    calls = []

    def add(name: str, b: int, h: int, t_q: int, t_k: int, h_kv: int = 0, **more: Any) -> None:
        calls.append(describe("attention", f"D {d} {name}", "", b, h, h_kv or h, t_q, t_k, d, **more))

    for d in (64, 128):
        h = 2048 // d  # 16,384 tokens of width 2,048, as in arXiv:2307.08691
        for kind, options in (("full", {}), ("causal", dict(causal=True))):
            for t in (512, 1024, 2048, 4096, 8192, 16384):
                add(f"{kind} T {t}", 16384 // t, h, t, t, axis="T_k", **options)
        add("padded", 8, h, 2048, 2048, padding="quarter")
        add("causal padded", 8, h, 2048, 2048, padding="quarter", causal=True)
        add("boolean mask", 8, h, 2048, 2048, mask="thinned")
        add("bias", 8, h, 2048, 2048, mask="heads")
        add("dropout", 2, h // 2, 2048, 2048, dropout_p=0.1)
        add("GQA 8 causal", 8, h, 2048, 2048, h // 8, causal=True)
        add("cross", 8, h, 512, 2048)
        add("decode", 16, h, 1, 4096, modes=("forward",))
        add("decode GQA 8", 16, h, 1, 8192, h // 8, modes=("forward",))
    return calls


def _decode_workloads() -> list[Call]:
    calls = []
    for d in (64, 128):
        for kind, options in (("contiguous", {}), ("pages", dict(page=16))):
            for t in (1024, 4096, 16384):
                shape = (16, 2048 // d, 256 // d, 1, t, d)
                calls.append(
                    describe(
                        "decode_attention", f"D {d} {kind} T {t}", "", *shape, axis="T_k", lengths="full", **options
                    )
                )
        eight = dict(lengths="full", int8=True, fp32=SCALES)
        calls.append(describe("decode_attention", f"D {d} 8 bits", "", 16, 2048 // d, 256 // d, 1, 4096, d, **eight))
        calls.append(describe("decode_attention", f"D {d} one row", "", 1, 8, 8, 1, 4096, d, lengths="full"))
        calls.append(describe("decode_attention", f"D {d} ragged pages", "", 16, 16, 2, 1, 8192, d, page=64))
        calls.append(
            describe("decode_attention", f"D {d} beams", "", 4, 8, 8, 1, 4096, d, beams=4, words=True, lengths="full")
        )
    return calls


def _row_workloads() -> list[Call]:
    def sweep(op: str, name: str, axis: str, elements: int, *widths: int, **options: Any) -> list[Call]:
        return [describe(op, f"{name} {axis} {n}", "", elements // n // 8 * 8, n, axis=axis, **options) for n in widths]

    return [
        *sweep("layer_norm", "rows", "N", 2**26, 256, 1024, 4096, 8192, 16384, params=AFFINE, axes=1, eps=1e-5),
        *sweep("rms_norm", "rows", "N", 2**26, 1024, 4096, 8192, params=AFFINE[:1], axes=1, eps=1e-6),
        *sweep(
            "add_layer_norm", "rows", "N", 2**26, 1024, 4096, params=("residual", *AFFINE, "x_bias"), p=0.1, eps=1e-5
        ),
        *sweep("add_rms_norm", "rows", "N", 2**26, 1024, 4096, 8192, params=("residual", "weight"), eps=1e-6),
        *sweep("softmax", "rows", "N", 2**26, 256, 1024, 4096, 8192, 32768),
        describe("softmax", "causal scores", "", 2, 16, 1024, 1024, causal=True, scale=0.125),
        *sweep("log_softmax", "rows", "N", 2**26, 4096, 32768),
        *sweep("cross_entropy", "classes", "V", 2**27, 4096, 32000, 50257, 131072),
        describe("cross_entropy", "smoothed", "", 4096, 32000, label_smoothing=0.1),
        *(describe("linear_cross_entropy", f"classes V {v}", "", 4096, 2048, v, axis="V") for v in (32000, 128256)),
        *sweep("bias_activation_dropout", "gelu", "N", 2**26, 4096, params=("bias",), activation="gelu", p=0.1),
        *sweep("bias_activation_dropout", "swiglu", "N", 2**26, 4096, 8192, params=("up",), activation="silu"),
        *sweep("bias_activation_dropout", "geglu", "N", 2**26, 4096, params=("up",), activation="gelu_tanh"),
        *[
            describe("rotary", f"{name} T_q 4096", "", 4, 16, 4096, 128, axis="T_q", fp32=("cos", "sin"), **more)
            for name, more in (("halves", dict(heads_last=True)), ("interleaved", dict(interleaved=True)))
        ],
        *sweep("dropout", "residual", "N", 2**26, 1024, 4096, params=("residual",), p=0.1),
    ]


def _layer(name: str, dropout: float = 0.0, **options: Any) -> Call:
    shape = (8, 1024, 1024, 1024, 16, 4096)
    return describe("decoder_layer", name, "", *shape, causal=True, dropout=dropout, norm_first=True, **options)


WORKLOADS = [
    *_attention_workloads(),
    *_decode_workloads(),
    *_row_workloads(),
    _layer("C 1024"),
    _layer("C 1024 padded", padding="quarter"),
    _layer("C 1024 dropout", dropout=0.1),
]
TIMED_OPS = tuple(dict.fromkeys(call.op for call in WORKLOADS))
