"""Calls of attention in which every two features meet (pairwise testing; Cohen et al., IEEE TSE 23(7), 1997).

Each call takes one level of every factor: a handful covers all pairs of levels, where all combinations are thousands.
"""

import itertools
from typing import Any

from tileformer.bench.calls import Call, describe

Level = dict[str, Any]
SEQUENCES = ((0, 13, 13, 14), (0, 11, 20, 27))  # for packing, as parts of T_q and T_k
FACTORS: dict[str, dict[str, Level]] = {
    "diagonal": {
        "no diagonal": {},
        "causal": dict(causal=True),
        "causal from the end": dict(causal="bottom_right"),
        "window": dict(window=(9, 4)),
        "window of the past": dict(window=(11, None), causal=True, align="bottom_right"),
    },
    "padding": {
        "no padding": {},
        "key mask": dict(padding="right"),
        "holes": dict(padding="holes"),
        "lengths": dict(lengths=True),
        "packed": dict(packed=SEQUENCES),
    },
    "mask": {"no mask": {}, "boolean mask": dict(mask="boolean")},
    "bias": {"no bias": {}, "bias": dict(bias="full"), "bias of columns": dict(bias="columns")},
    "linear": {"": {}, "ALiBi": dict(alibi=True)},
    "cap": {"": {}, "soft cap": dict(softcap=4.0)},
    "dropout": {"": {}, "dropout": dict(dropout_p=0.2)},
    "heads": {"": dict(h_kv=2), "shared keys": dict(h_kv=1)},
    "values": {"": {}, "narrow values": dict(dv=24)},
    "lse": {"": dict(lse=False), "log-sum-exp": dict(lse=True)},
    "shape": {"square": dict(t=(40, 40)), "wide": dict(t=(33, 70)), "tall": dict(t=(70, 33))},
}
PAIR_DTYPES = ("bf16", "fp32", "fp16")


def _rows() -> list[dict[str, str]]:
    """Rows that cover all pairs: each starts with a missing pair and takes, by factor, the level that adds most."""
    names = list(FACTORS)
    factors = itertools.combinations(names, 2)
    missing = dict.fromkeys(frozenset([(a, x), (b, y)]) for a, b in factors for x in FACTORS[a] for y in FACTORS[b])
    rows: list[dict[str, str]] = []
    while missing:
        row = dict(next(iter(missing)))
        for name in names:
            if name not in row:
                gains = {x: sum(frozenset([(name, x), item]) in missing for item in row.items()) for x in FACTORS[name]}
                row[name] = max(gains, key=gains.__getitem__)
        rows.append({name: row[name] for name in names})
        for pair in itertools.combinations(rows[-1].items(), 2):
            missing.pop(frozenset(pair), None)
    return rows


def _call(number: int, row: dict[str, str]) -> Call:
    levels: Level = {}
    for name, level in row.items():
        levels |= FACTORS[name][level]
    h_kv, (t_q, t_k), shape = levels.pop("h_kv"), levels.pop("t"), levels.pop("bias", None)
    b = 1 if "packed" in levels else 2
    if shape and "packed" in levels:  # where a bias has no gradient, an additive mask takes its place
        levels["mask"] = "additive"
    elif shape:
        levels["bias"] = (2, t_q, t_k) if shape == "full" else (b, 1, 1, t_k)
    reason = ", ".join(level for level in row.values() if level and not level.startswith("no "))
    dtypes = PAIR_DTYPES[number % 3 :] + PAIR_DTYPES[: number % 3]
    shape = (b, 2, h_kv, t_q, t_k, 32)
    return describe("attention", f"pairs {number}", reason, *shape, dtypes=dtypes, suite=False, **levels)


ROWS = _rows()
PAIRS = [_call(number, row) for number, row in enumerate(ROWS, 1)]
