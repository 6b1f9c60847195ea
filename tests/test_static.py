"""Static figures: control words, loops, pipes and spills of small listings; traffic and FLOPs of a launch; goals; the
same bytes twice."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tileformer.bench.static import evidence, goals, model, tiles
from tileformer.bench.static.figures import short_loads
from tileformer.bench.static.rates import RATES
from tileformer.bench.static.sass import Code, accesses, cycles, occupancy, spills, tensor_shapes

ROOT = Path(__file__).resolve().parents[1]


def _listing(*lines: str, control: int = 0x000FC200_00000000) -> str:
    """What `nvdisasm -hex -c` prints: an instruction's text and low word, then its high word; labels end in a colon."""
    text, address = [], 0
    for line in lines:
        if line.endswith(":"):
            text.append(line)
            continue
        text.append(f"        /*{address:04x}*/                   {line} ;                  /* 0x0000000000007918 */")
        text.append(f"                                                                     /* 0x{control:016x} */")
        address += 16
    return "\n".join(text)


def _paths(*lines: str) -> tuple[Code, list[list[str]]]:
    code = Code.parse(_listing(*lines))
    return code, [[i.op for i in code.path(head, body)] for head, body in code.loops()]


@pytest.mark.compat
def test_control_words_are_decoded() -> None:
    control = (5 << 41) | (2 << 46) | (3 << 49) | (0b100101 << 52)
    (found,) = Code.parse(_listing("@!P0 LDG.E.128 R4, desc[UR4][R2.64]", control=control)).instructions
    assert (found.predicate, found.op, found.args) == ("@!P0", "LDG.E.128", "R4, desc[UR4][R2.64]")
    assert (found.stall, found.writes, found.reads, found.waits, found.bytes) == (5, 2, 3, (0, 2, 5), 16)


def test_short_loads_are_those_of_the_loop_that_has_the_fewest() -> None:
    masked = [".L_x_0:", "LDG.E.U16 R0, [R2]", "LDG.E R1, [R4]", "HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA `(.L_x_0)"]
    main = [".L_x_1:", "LDGSTS.E.BYPASS.128 [R0], [R2.64]", "HMMA.16816.F32 R4, R8, R12, R4", "@P1 BRA `(.L_x_1)"]
    assert short_loads(_paths(*masked, "EXIT")[0]) == 1
    assert short_loads(_paths(*masked, *main, "EXIT")[0]) == 0
    assert short_loads(_paths("LDG.E.U8 R0, [R2]", "EXIT")[0]) == 0  # no loop, or none that multiplies matrices


def test_loops_are_found_by_dominators_not_by_position() -> None:
    """A block that waits for a barrier stands behind the exit and jumps back into the loop: it is no loop around the
    epilogue."""
    code, paths = _paths(
        "MOV R0, RZ", ".L_x_0:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR6], R8", "@!P1 BRA `(.L_x_2)", ".L_x_1:", "FFMA R1, R2, R3, R1",
        "ISETP.NE.AND P0, PT, R0, RZ, PT", "@P0 BRA `(.L_x_0)", "STG.E [R4], R1", "EXIT", ".L_x_2:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR6], R8",
        "@!P1 BRA `(.L_x_2)", "BRA `(.L_x_1)",
    )  # fmt: skip
    assert len(paths) == 2
    assert paths[0] == ["SYNCS.PHASECHK.TRANS64.TRYWAIT", "BRA"]  # the wait spins
    assert paths[1] == ["SYNCS.PHASECHK.TRANS64.TRYWAIT", "BRA", "FFMA", "ISETP.NE.AND", "BRA"]
    assert (
        "STG.E" not in paths[1] and len(code.loops()[1][1]) == 8
    )  # the wait's block belongs to the loop, the store does not


def test_nested_loops_and_unconditional_jumps() -> None:
    _, paths = _paths(
        ".L_x_0:",
        "MOV R0, RZ",
        ".L_x_1:",
        "FADD R1, R1, R2",
        "@P0 BRA `(.L_x_1)",
        "BRA `(.L_x_2)",
        "NOP",
        ".L_x_2:",
        "@P1 BRA `(.L_x_0)",
        "EXIT",
    )
    assert paths == [["FADD", "BRA"], ["MOV", "FADD", "BRA", "BRA", "BRA"]]


def test_pipes_are_counted_at_each_architecture_s_rate() -> None:
    path = Code.parse(
        _listing(
            "HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR4], R24", "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], R24", "MUFU.EX2 R0, R0",
            "FFMA R0, R1, R2, R3", "FMNMX R0, R1, R2, !PT", "LDS.128 R0, [R4]", "SHFL.BFLY PT, R0, R0, 0x1, 0x1f", "LDSM.16.M88.4 R0, [R4]", "NOP",
        )
    ).instructions  # fmt: skip
    # wgmma of 64 x N holds the pipe N / 2 cycles; with A in shared memory too, a narrow one waits for its operands: 32
    # / 4 + 16.
    assert cycles(path, RATES[90]) == dict(tensor=64 + 24, xu=8, fma=1, alu=2, mio=16 + 4 + 16, issue=9)
    assert cycles(path, RATES[80])["fma"] == 2
    hmma = Code.parse(_listing("HMMA.16816.F32.BF16 R4, R8, R12, R4")).instructions
    assert (cycles(hmma, RATES[80])["tensor"], cycles(hmma, RATES[90])["tensor"]) == (8.0, 6.4)


def test_spills_widths_and_shapes() -> None:
    code = Code.parse(
        _listing("STL.64 [R1], R2", "LDL R2, [R1+0x8]", "LDG.E.128.CONSTANT R4, desc[UR4][R2.64]", "@P0 STG.E.U16 desc[UR4][R2.64], R9",
                 "UTMALDG.4D [UR8], [UR4]", "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR4], R24", "HMMA.16816.F32 R4, R8, R12, R4")
    ).instructions  # fmt: skip
    assert spills(code) == dict(spill_instructions=2, spill_bytes=12)
    assert accesses(code) == {"128": 1, "16": 1, "bulk": 1}
    assert tensor_shapes(code) == {"HGMMA.64x64x16": 1, "HMMA.16816": 1}


def test_occupancy_is_what_registers_shared_memory_and_warps_allow() -> None:
    assert occupancy(255, 64 << 10, 4, RATES[90]) == 2  # 32 * 255 -> 8192 a warp: 8 warps
    assert occupancy(32, 100 << 10, 4, RATES[90]) == 2  # 228 KB / 101 KB
    assert occupancy(16, 0, 8, RATES[90]) == 8  # 64 warps
    assert occupancy(16, 0, 1, RATES[90]) == 32


def test_replay_overlaps_warps_and_waits_for_scoreboards() -> None:
    busy = Code.parse(_listing(*["MUFU.EX2 R0, R0"] * 10, control=0x000FE200_00000000)).instructions
    assert model.replay(busy, RATES[90], 1, 4) == pytest.approx(80, rel=0.05)  # one pipe, eight cycles each
    assert model.replay(busy, RATES[90], 2, 4) == pytest.approx(160, rel=0.05)
    free = Code.parse(_listing(*["FFMA R0, R1, R2, R3"] * 100, control=(1 << 41) | (7 << 46) | (7 << 49))).instructions
    stalled = Code.parse(
        _listing(*["FFMA R0, R1, R2, R3"] * 100, control=(4 << 41) | (7 << 46) | (7 << 49))
    ).instructions
    assert model.replay(free, RATES[90], 1, 4) == pytest.approx(100, rel=0.05)
    assert model.replay(stalled, RATES[90], 1, 4) == pytest.approx(400, rel=0.05)
    assert model.replay(stalled, RATES[90], 4, 4) == pytest.approx(400, rel=0.05)  # four warps fill each other's stalls
    # Each load writes scoreboard 0, and the next instruction waits for it.
    load = Code.parse(_listing("LDG.E R0, [R2]", control=(1 << 41) | (0 << 46) | (7 << 49) | (1 << 52))).instructions
    assert model.replay(load, RATES[90], 1, 4) >= model.MEMORY_LATENCY
    # What is copied into shared memory has to be there when a group is awaited: at once, or an iteration later.
    for keep, least, most in ((0, model.MEMORY_LATENCY, math.inf), (1, 0, model.MEMORY_LATENCY)):
        texts = ("LDGSTS.E.BYPASS.128 [R0], [R2.64]", "LDGDEPBAR", f"DEPBAR.LE SB0, {keep:#x}")
        copy = Code.parse(_listing(*texts, control=(1 << 41) | (7 << 46) | (7 << 49))).instructions
        assert least <= model.replay(copy, RATES[90], 1, 4, memory=1e9) < most
    # A descriptor's tile is awaited stages - 1 iterations after it is asked for; its size is that of the products'
    # right operands.
    texts = (
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R0",
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24",
        "UTMALDG.2D [UR8], [UR10]",
    )
    tile = Code.parse(_listing(*texts, control=(1 << 41) | (7 << 46) | (7 << 49))).instructions
    near, far = (model.replay(tile, RATES[90], 1, 4, memory=1e9, stages=stages) for stages in (2, 4))
    assert near >= model.MEMORY_LATENCY > 2.5 * far
    assert model.replay(tile, RATES[90], 1, 4, memory=1.0, stages=4) == pytest.approx(128 * 16 * 2 / 4, rel=0.1)
    band = model.band(busy, RATES[90], 2, 8)
    assert band[1] <= band[0] <= band[2] and band == model.band(busy, RATES[90], 2, 8)


ROWS = [
    dict(provider="tileformer", op="attention", workload="D 64 full", arch=90, kernel="k", issue_per_tensor=1.05),
    dict(provider="tileformer", op="attention", workload="D 64 causal", arch=90, kernel="k", issue_per_tensor=1.2, share=0.5, share_band=[0.4, 0.6]),
    dict(provider="liger", op="attention", workload="D 64 full", arch=90, kernel="k", issue_per_tensor=9.0),
]  # fmt: skip


@pytest.mark.parametrize(
    ("goal", "verdict", "worst"),
    [
        (
            dict(where=dict(op="attention"), figure="issue_per_tensor", at_most=1.1),
            "miss",
            1.2,
        ),  # the worst of ours, not the peer's
        (dict(where=dict(workload="* full"), figure="issue_per_tensor", at_most=1.1), "pass", 1.05),
        (dict(where=dict(arch=[80, 90]), figure="issue_per_tensor", at_least=1.1), "miss", 1.05),
        (dict(where=dict(arch=80), figure="issue_per_tensor", at_most=1.1), "not run", None),
        (
            dict(where=dict(op="attention", workload="D 128 *"), figure="issue_per_tensor", at_most=9.0),
            "miss",
            None,
        ),  # nobody has it: not a pass
        (dict(where=dict(op="attention"), figure="share", at_least=0.9) | {"class": "C"}, "lead", 0.5),
    ],
)
def test_goals_are_held_by_the_worst_row(goal: dict, verdict: str, worst: float | None) -> None:
    (found,) = goals.verdicts_of([{"name": "goal", "class": "A"} | goal], ROWS)
    assert (found["verdict"], found.get("worst")) == (verdict, worst)


def test_the_goals_file_is_complete() -> None:
    for goal in goals.load():
        assert {"name", "class", "where", "figure"} <= set(goal) and ("at_most" in goal) != ("at_least" in goal), goal
        assert goal["class"] in ("A", "B", "C")
    parts = goals.verdicts_of(goals.load(), ROWS, part=True)
    assert any(v["verdict"] == "not run" for v in parts) and all("limit" in v for v in parts)


_COUNT = """
import json, sys, torch
from tileformer.bench.calls import describe
from tileformer.bench.static import capture, traffic

found = []
for workload in (
    describe("attention", "causal", "", 1, 1, 1, 256, 256, 64, causal=True),
    describe("softmax", "rows", "", 16, 1000),
    describe("layer_norm", "rows", "", 16, 1024, params=("weight", "bias"), axes=1, eps=1e-5),
):
    counter = traffic.Counter()
    done = capture.run("tileformer", workload, 90, counter)
    for mode in ("forward", "backward"):
        moved = [(counter.bytes(mode, x), x.dim()) for x in [*done.inputs.values(), *done.outputs]]
        total, distinct = (sum(count[k] if dim > 1 else count[1] for count, dim in moved) for k in (0, 1))
        found.append(dict(op=workload.op, mode=mode, total=total, distinct=distinct, least=workload.bytes(torch.bfloat16, mode),
                          flops=counter.dots[mode], useful=workload.flops(mode)))
json.dump(found, sys.stdout)
"""


def _run(*command: str, stdin: str = "", **variables: str) -> str:
    paths = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = dict(os.environ, PYTHONPATH=paths, OMP_NUM_THREADS="1", **variables)
    done = subprocess.run(
        [sys.executable, *command], input=stdin, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.compat
def test_traffic_and_flops_of_our_launches() -> None:
    """Softmax and layer norm move each byte once; attention crosses DRAM once, reads keys for each query tile, and
    skips hidden tiles."""
    for found in json.loads(_run("-c", _COUNT)):
        assert found["distinct"] == found["least"], found
        if found["op"] == "attention":
            assert found["total"] > found["least"], found  # keys again for every query tile
            # Tiles on the diagonal are half hidden, those above it are skipped; the backward computes two of its five
            # products twice.
            assert 1.0 < found["flops"] / found["useful"] < (2.0 if found["mode"] == "forward" else 2.8), found
        else:
            assert found["total"] == found["least"] and found["flops"] == 0, found


@pytest.mark.aot
def test_the_same_figures_twice(tmp_path: Path) -> None:
    """From the command line with an empty cache and a full one the JSON is the same to the byte, and so are the rows of
    another process."""
    written = []
    for n in range(2):
        output = tmp_path / f"{n}.json"
        text = _run("-m", "tileformer", "bench", "static", "--arch", "90", "--op", "softmax", "--call", "rows N 1024", "--goals",
                    "--cache", str(tmp_path / "cache"), "--json", str(output))  # fmt: skip
        assert "_softmax_fwd_kernel" in text
        written.append(output.read_bytes())
    assert written[0] == written[1]
    rows = json.loads(written[0])["rows"]
    forward = next(row for row in rows if row["pass"] == "forward" and "kernel" in row)
    assert (
        forward["narrow"] == 0
        and forward["spill_bytes"] == 0
        and forward["accesses"]["128"] > 0
        and forward["roof"] <= 1.0
    )
    job = dict(kind="launches", provider="tileformer", arch=90, op="softmax", workloads=["rows N 1024"])
    again = json.loads(
        _run("-m", "tileformer.bench.static.capture", stdin=json.dumps(job), TRITON_CACHE_DIR=str(tmp_path / "other"))
    )
    key = lambda row: json.dumps(row, sort_keys=True)  # noqa: E731
    assert sorted(rows, key=key) == sorted(again, key=key)


def test_the_evidence_page_keeps_its_words_and_its_tables_are_files(tmp_path: Path) -> None:
    page = tmp_path / "evidence.md"
    page.write_text("# Words\n\n## Tables\n\nof yesterday\n")
    skipped = dict(provider="liger", op="softmax", workload="rows", arch=90, skipped="has | none")
    files = evidence.pages(page, [skipped], [], {"triton": "3.7"})
    assert set(files) == {page, tmp_path / "evidence" / "skipped.md"}
    assert files[page].startswith("# Words\n\n## Tables\n\nThis run: sm_90; triton 3.7.\n")
    assert "yesterday" not in files[page] and "(evidence/skipped.md): 1 rows" in files[page]
    assert "| 90 | liger | softmax rows | has \\| none |" in files[tmp_path / "evidence" / "skipped.md"]
    assert "## Tables" in (ROOT / "docs" / "evidence.md").read_text()


def test_the_search_takes_no_tile_that_spills_and_asks_the_replay_where_bounds_are_near() -> None:
    trials = [
        dict(row=(128, 32, 4, 3), stack=8, bound=1.0, replay=0.7),
        dict(row=(128, 64, 8, 3), stack=0, bound=0.80, replay=0.5),
        dict(row=(128, 64, 8, 2), stack=0, bound=0.79, replay=0.6),
        dict(row=(64, 64, 8, 3), stack=0, bound=0.40, replay=0.9),
        dict(row=(128, 128, 8, 3), problem="OutOfResources"),
    ]
    chosen = tiles.best(trials)
    assert chosen and chosen["row"] == (128, 64, 8, 2) and tiles.best(trials[:1]) is None


def test_a_search_adds_the_times_of_two_launches_and_keeps_the_worse_of_the_rest() -> None:
    first = dict(row=(64, 64, 8, 2), stack=0, blocks=2, bound=0.5, replay=0.25, registers=200)
    then = dict(row=(64, 64, 8, 2), stack=8, blocks=1, bound=0.5, replay=0.5, registers=100)
    worse = dict(row=(64, 64, 8, 2), stack=8, blocks=1, bound=0.25, replay=0.167, registers=200)
    assert tiles._one_after_the_other(first, then) == worse
    assert tiles._one_after_the_other(first, dict(problem="OutOfResources")) == dict(problem="OutOfResources")


def test_a_search_without_a_model_of_the_architecture_says_so() -> None:
    with pytest.raises(ValueError, match="no bound is known for sm_120: give --arch of 80, 90, 100"):
        tiles.search([80, 120], "FORWARD plain 64", lambda trial: None)


def test_a_search_for_no_table_says_so() -> None:
    with pytest.raises(ValueError, match="no table, feature and head size has 'D 64' in its name"):
        tiles.search([80], "D 64", lambda trial: None)
