"""Choose attention's tiles without a GPU: `tileformer bench static --tiles "FORWARD plain 128"`.

Every candidate is compiled through the public op and held to class B's bound: the useful cycles of the tensor cores
over those of the busiest pipe of the main loop, spilled registers among them at what their loads and stores cost. Of
the tiles without a stack whose bounds are within `NEAR` of the best, the one that the replay (class C) likes best is
printed as a row of kernels/attention/tiles.py.
"""

import itertools
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import torch
from triton.runtime.errors import OutOfResources, PTXASError

from tileformer import kernels
from tileformer.bench.calls import Call, describe, differentiate, function_of, leaves_of
from tileformer.bench.recording import Launch, record
from tileformer.bench.static import figures, model
from tileformer.bench.static.rates import RATES
from tileformer.bench.static.sass import occupancy
from tileformer.kernels import launch as launching
from tileformer.kernels.attention.tiles import BACKWARD_DKDV, BACKWARD_DQ, FORWARD, Row, family, tiles_for

TABLES = {
    "FORWARD": (FORWARD, "_attention_fwd_kernel", "forward"),
    "BACKWARD_DQ": (BACKWARD_DQ, "_attention_bwd_dq_kernel", "backward"),
    "BACKWARD_DKDV": (BACKWARD_DKDV, "_attention_bwd_dkdv_kernel", "backward"),
}
PRODUCTS = {"FORWARD": (1, 1), "BACKWARD_DQ": (2, 1), "BACKWARD_DKDV": (2, 2)}  # over D, over D_v
_QUERY_ROWS: list[Row] = list(itertools.product((64, 128), (16, 32, 64, 128), (4, 8), (2, 3)))
CANDIDATES: dict[str, list[Row]] = {
    "FORWARD": _QUERY_ROWS,
    "BACKWARD_DQ": _QUERY_ROWS,
    "BACKWARD_DKDV": list(itertools.product((16, 32, 64), (32, 64, 128), (4, 8), (1, 2, 3))),
}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": dict(causal=True, padding="right"),
    "overlap": dict(causal=True),
    "mask": dict(causal=True, bias=(1, 1, 1024, 1024)),
    "dropout": dict(causal=True, dropout_p=0.1),
    "both": dict(causal=True, bias=(1, 1, 1024, 1024), dropout_p=0.1),
}
SIZES: dict[str, tuple[int, int]] = {  # D and D_v, by name; the row of a table that each reaches is tiles_for's
    **{str(size): (size, size) for size in (64, 80, 96, 128, 160)},
    "192/128": (192, 128),
    "256": (256, 256),
}
MOST_VALUES = 320  # registers of a thread that accumulators and scores may ask for before a tile is not tried
NEAR = 0.97


def bound_of(launch: Launch, name: str) -> dict[str, Any]:
    """What decides of a tile: registers, spills, cycles of the main loop on each pipe, `bound`, and the replay."""
    result, c, rates = figures.exact(launch), launch.constants, RATES[launch.binary.arch]
    f, (over_d, over_dv), code = c["F"], PRODUCTS[name], figures.code_of(launch.binary.cubin, launch.binary)
    path = figures.main_loop(code)
    useful = 2 * c["BLOCK_M"] * c["BLOCK_N"] * (over_d * f.BLOCK_D + over_dv * f.BLOCK_DV) / rates.tensor_flops
    looped = c["BLOCK_M" if name == "BACKWARD_DKDV" else "BLOCK_N"]
    pipes = model.bound(path, rates, 1, launch.warps, 2 * looped * (f.BLOCK_D + f.BLOCK_DV))
    tensor = pipes["tensor"] = pipes["tensor"] or useful  # tcgen05 does not say
    blocks = occupancy(result["registers"], launch.binary.shared, launch.warps, rates)
    replay = model.band(path, rates, blocks, launch.warps, launch.stages)[0] / max(1, blocks)
    keep = ("registers", "stack", "spill_bytes", "shared", "old_dots")
    return {key: result[key] for key in keep} | dict(
        blocks=blocks, bound=round(useful / max(pipes.values()), 3), replay=round(useful / replay, 3),
        shared_per_tensor=round(pipes["mio"] / tensor, 3), issue_per_tensor=round(pipes["issue"] / tensor, 3),
    )  # fmt: skip


def _one_after_the_other(first: dict[str, Any], then: dict[str, Any]) -> dict[str, Any]:
    """The trials of two launches of a tile as one: their times add up, and the worse of each other figure."""
    if "problem" in first or "problem" in then:
        return first if "problem" in first else then
    worse = {key: max(first[key], x) for key, x in then.items() if isinstance(x, int | float)}
    times = {key: round(1 / (1 / first[key] + 1 / then[key]), 3) for key in ("bound", "replay")}
    return then | worse | dict(blocks=min(first["blocks"], then["blocks"])) | times


def _values(name: str, row: Row, d: int, dv: int) -> float:
    m, n, warps = row[:3]
    sums = {"FORWARD": m * dv, "BACKWARD_DQ": m * d, "BACKWARD_DKDV": n * (d + dv if max(d, dv) <= 128 else d)}[name]
    return (sums + m * n) / (32 * warps)


def _call(feature: str, size: str) -> Call:
    d, dv = SIZES[size]
    return describe("attention", f"D {size}", "", 1, 4, 4, 1024, 1024, d, dv=dv, **FEATURES[feature])


def trials(arch: int, name: str, feature: str, size: str) -> Iterator[dict[str, Any]]:
    """Each candidate of a table, feature and head size: its row and `bound_of`, or why there is none."""
    table, kernel, mode = TABLES[name]
    call, (d, dv) = _call(feature, size), (max(16, 1 << (x - 1).bit_length()) for x in SIZES[size])
    shipped = tiles_for(table, arch, max(SIZES[size]), torch.bfloat16, feature)[0]
    first = tuple(shipped[option] for option in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"))
    rows = dict.fromkeys([first, *(row for row in CANDIDATES[name] if _values(name, row, d, dv) <= MOST_VALUES)])
    tensors, options = call.untouched_inputs(torch.bfloat16)
    original = launching.Launch.__call__
    results: dict[Row, dict[str, Any]] = {}

    def instead(own: launching.Launch, *given: Any) -> None:
        if own.kernel.fn.__name__ != kernel:
            return
        for row in rows:
            # tiles_for knows what else belongs to such a row: it reads the table.
            bucket = next(x for x in (64, 128, 256) if max(SIZES[size]) <= x)
            fake = {key: {bucket: row} for key in table}
            with unittest.mock.patch.dict(table, fake):
                tile = tiles_for(table, arch, max(SIZES[size]), torch.bfloat16, feature)[0]
            trial = dict(table=name, arch=family(arch), feature=feature, size=size, row=row)
            try:
                original(launching.Launch(own.kernel, own.grid, own.flags, [tile], own.scalars, own.arrange), *given)
                trial |= bound_of(launches[-1], name)
            except (OutOfResources, PTXASError, RuntimeError) as error:  # RuntimeError: MLIR's own
                trial["problem"] = " ".join(f"{type(error).__name__}: {error}".split())[:100]
            results[row] = _one_after_the_other(results[row], trial) if row in results else trial

    patched = unittest.mock.patch.object(launching.Launch, "__call__", instead)
    with record(arch) as launches, kernels.use_backend("triton"), patched:
        leaves, function = leaves_of(call, tensors), function_of(kernels, "attention")
        if mode == "forward":
            function(leaves, options)
        else:
            differentiate(function, leaves, options, lambda _, x: torch.empty_like(x))
    yield from results.values()


def best(tried: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Of the tiles that keep all registers, the best bound; of those within `NEAR` of it the best replay."""
    right = [trial for trial in tried if not trial.get("stack", 1)]
    most = max((trial["bound"] for trial in right), default=0.0)
    near = [trial for trial in right if trial["bound"] >= NEAR * most]
    return max(near, key=lambda trial: (trial["replay"], trial["bound"]), default=None)


def search(archs: list[int], only: str, keep: Callable[[dict[str, Any]], None]) -> None:
    """Print every trial and the row to paste of each table, feature and head size with `only` in its name."""
    names = list(itertools.product(archs, TABLES, FEATURES, SIZES))
    wanted = [x for x in names if only in " ".join(x[1:]) and (family(x[0]), x[2]) in TABLES[x[1]][0]]
    if not wanted:
        raise ValueError(f"no table, feature and head size has {only!r} in its name, like 'BACKWARD_DQ plain 64'")
    if unmodelled := [arch for arch in archs if arch not in RATES]:
        raise ValueError(f"no bound is known for sm_{unmodelled[0]}: give --arch of {', '.join(map(str, RATES))}")
    for arch, name, feature, size in wanted:
        tried: list[dict[str, Any]] = []
        for trial in trials(arch, name, feature, size):
            tried.append(trial)
            keep(trial)
            said = trial.get("problem") or " ".join(f"{key} {trial[key]}" for key in list(trial)[5:])
            print(f"sm_{arch} {name} {feature} {size} {trial['row']}: {said}", flush=True)
        chosen = best(tried)
        if feature == "plain" and max(SIZES[size]) & (max(SIZES[size]) - 1):
            feature = "ragged"  # as tiles_for
        row = "no tile keeps all registers" if chosen is None else f'({family(arch)}, "{feature}"): {chosen["row"]}'
        print(f"{name}, head size {size}: {row}", flush=True)
