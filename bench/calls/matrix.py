"""What is compiled ahead: the default configurations of the tile tables, as calls that reach each of them."""

from collections.abc import Iterator
from typing import Any

from tileformer.bench.calls import Call, describe
from tileformer.bench.calls.op import AFFINE, SCALES

EVERY_SIZE = "causal padded"  # the features that are compiled for every head size, and in float32
FEATURES: dict[str, dict[str, Any]] = {
    EVERY_SIZE: dict(causal=True, padding="right"),
    "plain": dict(lse=False),
    "boolean mask": dict(mask="boolean"),
    "additive mask": dict(mask="additive"),
    "dropout": dict(causal=True, padding="right", dropout_p=0.1),
    "padded": dict(padding="right"),  # as cross-attention: each query head has a key head of its own
    "everything": dict(causal="bottom_right", padding="right", mask="additive", dropout_p=0.1),
    "dropout, no causal": dict(dropout_p=0.1),
    "window, lengths": dict(window=(100, 30), lengths=True),
    "packed": dict(causal=True, packed=((0, 100, 256), (0, 120, 256)), lse=False),
    "ALiBi, soft cap": dict(causal=True, alibi=True, softcap=30.0),
    "bias": dict(causal=True, bias=(1, 1, 256, 256)),
    "all of these": dict(
        window=(100, 30), lengths=True, alibi=True, softcap=30.0, bias=(1, 1, 256, 256), dropout_p=0.1
    ),
    "weights": dict(causal=True, padding="right", bias=(1, 1, 256, 256), return_weights=True),
}
# Keys enough for the forward that works ahead.
LONG: dict[str, dict[str, Any]] = {"long": dict(lse=False), "long, causal": dict(causal=True)}
HEAD_SIZES = (16, 32, 40, 64, 80, 96, 128, 160, 192, 256)
USED = (40, 64, 72, 80, 96, 112, 128, 160, 256)  # by published models, as 192 with values of 128 is: every feature
# Strides of 8 mod 16, of heads and (264 keys) of dense masks; 112 is in the same column of the tables.
RAGGED: dict[int, tuple[str, ...]] = {
    40: ("plain", "boolean mask", "bias"),
    72: ("plain", "boolean mask", "bias", "dropout", "weights"),
    112: ("plain", "bias"),
}
SAMPLED = {(64, "bf16", EVERY_SIZE), (64, "bf16", "weights"), (128, "bf16", "long, causal")}


def _attention_matrix() -> Iterator[Call]:
    for size in sorted({*HEAD_SIZES, *RAGGED}):
        wanted = {EVERY_SIZE, *RAGGED.get(size, ())}
        wanted |= FEATURES.keys() if size in USED else set()
        wanted |= LONG.keys() if size == 128 else set()
        for feature in [name for name in FEATURES | LONG if name in wanted]:
            length, h_kv = 1024 if feature in LONG else 256, 2 if feature == "padded" else 1
            fp32 = feature == EVERY_SIZE and size in HEAD_SIZES
            dtypes = ["bf16"] + ["fp32"] * fp32 + ["fp16"] * ((size, feature) == (64, EVERY_SIZE))
            for dtype in dtypes:
                keys = 264 if feature in RAGGED.get(size, ()) else length
                yield _attention(size, feature, dtype, length, h_kv, keys)
    for feature in ("boolean mask", "bias"):
        yield _attention(64, feature, "bf16", 256, 1, 264)
    for feature in FEATURES:
        yield _attention(192, feature, "bf16", 256, 2 if feature == "padded" else 1, 256, 128)


def _attention(size: int, feature: str, dtype: str, length: int, h_kv: int, keys: int, dv: int = 0) -> Call:
    fields: dict[str, Any] = dict(dtypes=(dtype,), quick=(size, dtype, feature) in SAMPLED, lse=True)
    fields |= (FEATURES | LONG)[feature]
    if "bias" in fields:
        fields["bias"] = (1, 1, length, keys)
    if dv:
        fields["dv"] = dv
    name = f"D {size}{f'/{dv}' if dv else ''} {feature}" + f", T_k {keys}" * (keys != length)
    return describe("attention", name, "tile table", 1, 2, h_kv, length, keys, size, **fields)


DECODE: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "pages": dict(page=16),
    "large pages": dict(page=128),
    "8 bits": dict(int8=True, fp32=SCALES),
    "8 bits in pages": dict(page=16, int8=True, fp32=SCALES),
    "beams": dict(beams=4, words=True),
    "everything": dict(
        page=16, beams=4, words=True, starts=True, window=100, softcap=30.0, bias="full", lengths="ragged"
    ),
    "many rows": dict(beams=32, causal=False),
}


def _decode_matrix() -> Iterator[Call]:
    for size in HEAD_SIZES:
        for feature, options in DECODE.items():
            if feature not in ("contiguous", "pages") and size not in (64, 128, 256):
                continue
            single = feature in ("contiguous", "pages", "many rows") and size in (16, 64, 128, 256)
            for dtype in ("bf16", "fp32") if single else ("bf16",):
                fields = dict(dtypes=(dtype,), quick=(size, dtype, feature) == (64, "bf16", "pages"))
                shape = (1, 4, 2, 2 if feature == "everything" else 1, 512, size)
                yield describe("decode_attention", f"D {size} {feature}", "tile table", *shape, **fields | options)


def _append_matrix() -> Iterator[Call]:
    for size in (64, 80, 256):
        for feature in ("contiguous", "pages"):
            shape = (2, 2, 2, 1, 512, size)
            yield describe("append_kv_cache", f"D {size} {feature}", "", *shape, dtypes=("bf16",), **DECODE[feature])


def _row_matrix() -> Iterator[Call]:
    bf16: dict[str, Any] = dict(dtypes=("bf16",))
    for n in (128, 1024, 3072, 4096, 8192, 16384):
        sampled = n == 1024
        norm, warps = (f"N {n}", "warps and rows table", 64, n), (f"N {n}", "warps table", 64, n)
        dtypes = ("bf16",) if sampled else ("bf16", "fp32")
        yield describe("layer_norm", *norm, params=AFFINE, axes=1, dtypes=dtypes)
        yield describe("rms_norm", *norm, params=AFFINE[:1], axes=1, eps=1e-6, **bf16)
        if n <= 8192:
            fused = ("residual", *AFFINE, "x_bias")
            yield describe("add_layer_norm", *norm, params=fused, p=0.1, quick=sampled, **bf16)
            yield describe(
                "add_layer_norm", f"{norm[0]} last", *norm[1:], params=fused, p=0.1, norm_first=False, **bf16
            )
            yield describe("add_rms_norm", *norm, params=fused[:2], eps=1e-6, **bf16)
        yield describe("softmax", *warps, quick=sampled, **bf16)
        yield describe("log_softmax", *warps, **bf16)
        acts: list[tuple[str, dict[str, Any]]] = [
            ("gelu", dict(params=("bias",), p=0.1)),
            ("silu", dict(params=("up",))),
            *((kind, dict(params=("bias", "up"), p=0.1, dtypes=dtypes)) for kind in ("relu", "gelu_tanh") if n == 4096),
        ]
        for kind, more in acts:
            more = bf16 | dict(activation=kind) | more
            yield describe("bias_activation_dropout", f"{kind} N {n}", warps[1], 64, n, **more)
        yield describe("dropout", *warps, params=("residual",), p=0.1, **bf16)
    heads: dict[str, tuple[int, dict[str, Any]]] = {
        "B, T, H, D": (64, dict(heads_last=True)),
        "interleaved": (128, dict(interleaved=True)),
        "partial": (128, dict(rotated=64)),
        "partial, odd": (80, dict(rotated=32, interleaved=True)),
    }
    for name, (d, more) in heads.items():
        yield describe("rotary", f"D {d} {name}", "rows of a tile", 2, 4, 64, d, fp32=("cos", "sin"), **bf16 | more)
    for classes in (4096, 32000, 131072):
        options = dict(weighted=True, label_smoothing=0.1, quick=classes == 32000)
        yield describe("cross_entropy", f"V {classes}", "blocks of classes", 8, classes, **options, **bf16)
    capped = dict(z_loss=1e-4, softcap=30.0)
    yield describe("cross_entropy", "V 32000 capped", "z-loss and soft cap", 8, 32000, **capped, **bf16)


MATRIX = [*_attention_matrix(), *_decode_matrix(), *_append_matrix(), *_row_matrix()]
