"""The benchmarks: FLOPs and bytes against counting, providers against the reference, no speed over a red result, dry
runs."""

import collections
import contextlib
import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tileformer.__main__ import main
from tileformer.bench.calls import Call, describe, providers
from tileformer.bench.calls.op import MODES, attended_pairs
from tileformer.bench.calls.workloads import TIMED_OPS, WORKLOADS
from tileformer.bench.speed import gpu_day, measure, plot, run, step, tune
from tileformer.bench.speed.measure import Bench, Clock, Result, Truth
from tileformer.kernels import softmax, use_backend

CPU = torch.device("cpu")
FIRSTS = run.chosen("all", CPU, dry=False, only=None)  # one point of each sweep


def seen(workload: Call, options: dict) -> torch.Tensor:
    """Boolean (B, H, T_q, T_k): what a query may attend to after the causal shift and padding, counted one by one."""
    s = workload.sizes
    keep = torch.ones(s["B"], s["H"], s["T_q"], s["T_k"], dtype=torch.bool)
    if workload.options.get("causal"):
        shift = s["T_k"] - s["T_q"] if workload.options["causal"] == "bottom_right" else 0
        keep &= torch.arange(s["T_k"]) <= torch.arange(s["T_q"])[:, None] + shift
    if "key_mask" in options:
        keep &= options["key_mask"][:, None, None]
    return keep


@pytest.mark.parametrize("causal", [False, True, "bottom_right"])
@pytest.mark.parametrize("padding", [{}, {"padding": "quarter"}], ids=["full", "padded"])
@pytest.mark.parametrize(("t_q", "t_k"), [(7, 7), (5, 12), (12, 5), (1, 9), (9, 1)])
def test_attended_pairs_are_those_of_the_mask(causal, padding, t_q, t_k):
    options = {"causal": causal} if causal else {}
    workload = describe("attention", "counted", "", 3, 4, 2, t_q, t_k, 8, **options, **padding)
    _, options = workload.inputs("cpu", torch.float32)
    pairs = int(seen(workload, options).sum())
    assert attended_pairs(workload.sizes, workload.options) == pairs
    assert workload.flops("forward") == 2 * 2 * pairs * 8
    assert [workload.flops(mode) * 2 for mode in MODES] == [workload.flops("forward") * n for n in (2, 5, 7)]


@pytest.mark.parametrize("workload", [w for w in FIRSTS if w.op != "decoder_layer"], ids=lambda w: f"{w.op} {w.name}")
def test_bytes_are_those_of_the_tensors(workload):
    workload, item = workload.small(), 4
    tensors, options = workload.inputs("cpu", torch.float32)
    sizes = {name: x.numel() * item for name, x in tensors.items()}
    inputs = sum(sizes.values())
    sides = sum(x.numel() * x.element_size() for n, x in options.items() if n in ("mask", "key_mask"))
    out = providers.reference(workload)(tensors, options)
    unread = 0
    if workload.op == "attention" and "key_mask" in options:  # keys and values of padding
        unread = 2 * item * int((~options["key_mask"]).sum()) * workload.sizes["H_kv"] * workload.sizes["D"]
    if workload.op == "softmax" and "causal" in options:
        unread = item * int((~seen(workload, options)).sum())
    if workload.op == "decode_attention":  # of the caches, what is filled
        slots, (b, _, _, d) = int(options["lengths"].sum()), tensors["q"].shape
        row = d + 4 if tensors["k"].dtype == torch.int8 else item * d  # with its scale
        moved = 2 * item * tensors["q"].numel() + 2 * slots * workload.sizes["H_kv"] * row
        assert [workload.bytes(torch.float32, mode) for mode in ("forward", "backward")] == [moved, 0]
        assert out.shape == tensors["q"].shape and workload.flops("forward") == 4 * slots * d * tensors["q"].shape[
            1
        ] * (b // len(options["lengths"]))
        return
    made = item * sum(x.numel() for x in (out if isinstance(out, tuple) else (out,)))
    gradients = inputs
    if workload.op.startswith("add_") and not options.get("p"):  # x and residual share theirs
        gradients -= sizes["x"]
    saved = {  # what the backward reads besides the output's gradient
        "attention": inputs + made - unread,
        "layer_norm": sizes.get("x", 0) + sizes.get("weight", 0),
        "rms_norm": sizes.get("x", 0) + sizes.get("weight", 0),
        "add_layer_norm": sizes.get("x", 0) + sizes.get("weight", 0),  # the total is as large as x
        "add_rms_norm": sizes.get("x", 0) + sizes.get("weight", 0),
        "softmax": made - unread,
        "log_softmax": made,
        "cross_entropy": inputs,
        "linear_cross_entropy": inputs,
        "bias_activation_dropout": inputs,
        "dropout": 0,
        "rotary": 0,
    }[workload.op]
    arrives = made - (unread if workload.op == "softmax" else 0)
    forward, backward = inputs - unread + sides + made, saved + sides + arrives + gradients
    if workload.op == "dropout":
        backward -= sizes["residual"]  # its gradient is the one that arrives
    if workload.op.endswith("cross_entropy"):
        targets = 8 * workload.sizes["R"]
        assert workload.bytes(torch.float32, "forward") == inputs + targets  # the loss itself is four bytes
        assert workload.bytes(torch.float32, "backward") == 2 * inputs + targets
        assert workload.bytes(torch.float32, "both") == 2 * inputs + targets
        return
    assert workload.bytes(torch.float32, "forward") == forward
    assert workload.bytes(torch.float32, "backward") == backward
    assert workload.bytes(torch.float32, "both") == forward + backward


def test_a_decoder_layers_flops_are_those_that_torch_counts():
    workload = next(w for w in WORKLOADS if w.op == "decoder_layer").small()
    whole = dataclasses.replace(workload, options=workload.options | dict(causal=False))  # torch counts what is masked
    tensors, options = workload.inputs("cpu", torch.float32)
    with FlopCounterMode(display=False) as counter, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        providers.reference(workload)(tensors, options)
    assert whole.flops("forward") == counter.get_total_flops()
    hidden = 64 * 63 // 2 * workload.sizes["B"] * 2  # pairs above the diagonal, two heads
    assert whole.flops("forward") - workload.flops("forward") == 4 * 64 * hidden


@pytest.mark.parametrize("workload", FIRSTS, ids=lambda w: f"{w.op} {w.name}")
def test_every_provider_agrees_with_the_reference(workload, monkeypatch):
    monkeypatch.setattr(providers, "compile_backend", "aot_eager")
    sized = workload.small().without_dropout()
    tensors, options = sized.inputs("cpu", torch.float32)
    truth, ran = Truth(sized, tensors, options), set()
    for name, build in providers.providers(workload.op).items():
        if name in ("torch.compile", "flex") and workload.name not in (
            "D 64 causal padded",
            "D 64 bias",
            "smoothed",
            "rows N 256",
        ):
            continue  # a compilation takes a second; a dry run has the rest
        try:
            ratios, _ = truth.errors(build(sized), tensors, options)
        except providers.Unavailable:
            continue
        ran.add(name)
        assert max(ratios.values()) <= 1.0, (name, ratios)
        assert set(ratios) >= {"out"} if name == "flex" else set(ratios) == set(truth.truth)
    assert ran >= ({"sdpa", "sdpa flash", "sdpa math"} if workload.op == "attention" else set()) | {
        "tileformer",
        "eager",
    }


def test_names_are_unique_and_every_op_is_there():
    names = [(w.op, w.name) for w in WORKLOADS]
    assert len(set(names)) == len(names)
    rows = {"layer_norm", "rms_norm", "softmax", "log_softmax", "cross_entropy", "linear_cross_entropy", "dropout"}
    rows |= {"add_layer_norm", "add_rms_norm", "bias_activation_dropout", "rotary"}
    assert set(TIMED_OPS) == {"attention", "decode_attention", "decoder_layer"} | rows
    assert all(next(iter(providers.providers(op))) == providers.OURS for op in TIMED_OPS)


def test_dropout_is_timed_with_its_rate_and_drops():
    workload = next(w for w in WORKLOADS if w.op == "dropout").small()
    tensors, options = workload.inputs("cpu", torch.float32)
    for name in (providers.OURS, "eager"):
        dropped = providers.providers("dropout")[name](workload)(tensors, options) == tensors["residual"]
        assert 0.05 < dropped.float().mean() < 0.2, name


def test_large_attention_is_judged_on_its_last_heads(monkeypatch):
    workload = next(w for w in WORKLOADS if w.name == "D 64 GQA 8 causal").small()
    tensors, options = workload.inputs("cpu", torch.float32)
    monkeypatch.setattr(measure, "LARGEST_TRUTH", 1)
    truth = Truth(workload, tensors, options)
    assert truth.truth["out"].shape == (1, 8, 64, 64) and truth.truth["dk"].shape == (1, 1, 64, 64)
    call = providers.providers("attention")["eager"](workload)
    assert max(truth.errors(call, tensors, options)[0].values()) <= 1.0

    def wrong(tensors, options):
        return call(tensors, options) * torch.cat([torch.ones(63), torch.tensor([1.01])])[:, None]

    assert truth.errors(wrong, tensors, options)[0]["out"] > 1.0


@pytest.fixture
def bench(monkeypatch) -> Bench:
    """A bench whose rounds take 1, 2, ... 11 ms, on a device that moves 100 GB/s and computes 2 TFLOP/s."""
    monkeypatch.setattr(Clock, "ceilings", lambda self, dtype: {"copy GB/s": 100.0, "matmul TFLOP/s": 2.0})
    monkeypatch.setattr(Clock, "rounds", lambda self, prepare, body: [n / 1e3 for n in range(1, 12)])
    return Bench(CPU, torch.float32, scale=1)


SOFTMAX = next(w for w in WORKLOADS if w.op == "softmax")
ATTENTION = next(w for w in WORKLOADS if w.name == "D 64 full T 512")


def test_figures_follow_from_the_rounds(bench):
    result = next(bench.measure(ATTENTION, [providers.OURS], ["forward"]))
    flops, moved = 4 * 2 * 2 * 64 * 64 * 64, 4 * 4 * 2 * 2 * 64 * 64
    assert (result.median_ms, result.p20_ms, result.p80_ms, result.rounds) == (6.0, 3.0, 9.0, 11)
    assert result.tflops == pytest.approx(flops / 6e-3 / 1e12)
    assert result.gbs == pytest.approx(moved / 6e-3 / 1e9)
    assert result.share == pytest.approx(max(moved / 100e9, flops / 2e12) / 6e-3)
    assert result.speedup == 1.0 and result.over_budget <= 1.0 and not result.reason
    bench.ceilings["copy GB/s"] = 0.001  # what was beaten is no ceiling, and what a dry run finds is none either
    assert next(bench.measure(ATTENTION, [providers.OURS], ["forward"])).share is None
    bench.ceilings["copy GB/s"], bench.clock.dry = 100.0, True
    assert next(bench.measure(ATTENTION, ["eager"], ["forward"])).share is None


def test_a_gpu_sleeps_until_the_host_has_launched_everything(monkeypatch):
    """Else a call that takes the host longer than the GPU would be timed on the host."""
    clock, done = Clock(CPU, dry=True), []
    monkeypatch.setattr(clock.cuda, "_sleep", lambda cycles: done.append(cycles), raising=False)
    slow, other = (lambda _: time.sleep(0.002)), (lambda _: None)
    for body in (slow, slow, other):
        clock.round(lambda: None, body)
    assert done[0] == done[2] == 0 and 2 * 0.002 * measure.CYCLES <= done[1] <= 0.02 * measure.CYCLES


@pytest.mark.parametrize("name", ["fla", "sdpa"])
def test_each_provider_has_tensors_in_the_layout_it_reads_in_place(name):
    """And a gradient in that of its output: no copy is timed. Nobody is given a seed, which others have to draw."""
    workload = next(w for w in WORKLOADS if w.name == "D 64 causal T 512").small()
    tensors, options = workload.inputs("cpu", torch.float32)
    given = []

    def call(t, o):
        given.extend((t["q"], o))
        return (t["q"] * t["k"] * t["v"]).transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)

    call.stored = getattr(providers.providers("attention")[name](workload), "stored", torch.clone)
    prepare, body = measure.passes(workload, call, tensors, options | {"seed": torch.ones(1)}, "backward")
    gradients = []
    out = prepare()
    out.register_hook(lambda g: gradients.append(g.stride()))
    body(out)
    assert given[0].transpose(1, 2).is_contiguous() == (name == "fla") and "seed" not in given[1]
    assert gradients == [out.stride()] and not out.is_contiguous()


def test_no_speed_over_a_red_result(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(Clock, "rounds", lambda self, prepare, body, cold=True: calls.append(body) or [1.0, 1.0])
    wrong = lambda workload: lambda tensors, options: tensors["x"].softmax(-1) * 1.01  # noqa: E731
    entries = dict(providers.providers("softmax"), tileformer=wrong, eager=wrong)
    monkeypatch.setitem(providers._PROVIDERS, "softmax", entries)
    bench = Bench(CPU, torch.float32, scale=1)
    calls.clear()
    results = list(bench.measure(SOFTMAX, ["tileformer", "eager"], MODES))
    assert len(results) == 6 and not calls, "a wrong provider was timed"
    assert all(r.median_ms is None and r.tflops is None and r.failed and r.over_budget > 1.0 for r in results)
    assert "times its budget" in results[0].reason
    assert main(["bench", "softmax", "--device", "cpu", "--only", "N 256", "--provider", "tileformer"]) == 1
    assert "FAILED: error of" in capsys.readouterr().out


def test_a_peers_exception_is_reported_and_stops_nothing(monkeypatch, bench):
    def broken(workload):
        raise AttributeError("module has no attribute 'attend'")

    monkeypatch.setitem(providers._PROVIDERS, "softmax", dict(providers.providers("softmax"), liger=broken))
    results = list(bench.measure(SOFTMAX, ["liger", "eager"], ["forward"]))
    assert results[0].failed and results[0].reason == "AttributeError: module has no attribute 'attend'"
    assert not results[1].failed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["attention", "--only", "D 63"], "no workload of attention has 'D 63' in its name"),
        (["softmax", "--provider", "flashinfer"], "unknown provider 'flashinfer': there are eager, fastest, fla"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, said):
    assert main(["bench", *arguments, "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is one")
def test_gpu_day_without_a_gpu_says_so(capsys):
    assert main(["bench", "gpu-day"]) == 2
    assert "--dry" in capsys.readouterr().err or "cannot use" in capsys.readouterr().err


def test_tables_files_and_plots_of_a_small_run(tmp_path, capsys):
    files = {kind: str(tmp_path / f"out.{kind}") for kind in ("json", "csv")}
    options = ["--provider", "tileformer", "--provider", "eager", "--only", "N 256", "--device", "cpu"]
    assert main(["bench", "softmax", *options, "--json", files["json"], "--csv", files["csv"]]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^both +eager +\d", printed, re.M)
    assert (
        "%" not in printed.replace("20 %", "").replace("80 %", "") and "copy GB/s" not in printed
    )  # a CPU has no ceilings
    report = json.loads((tmp_path / "out.json").read_text())
    with open(files["csv"]) as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report["results"]) == 6 and not report["dry"]
    assert {row["provider"] for row in rows} == {"tileformer", "eager"} and {row["share"] for row in rows} == {""}


def test_figures_are_on_the_disk_before_the_next_workload(tmp_path, monkeypatch, capsys):
    files, seen = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv")}, []

    def measured(self, workload, names, modes):
        seen.append([file.exists() and len(file.read_text().split("softmax")) - 1 for file in files.values()])
        if len(seen) == 3:
            raise KeyboardInterrupt
        yield Result(
            "softmax",
            workload.name,
            "tileformer",
            "forward",
            "float32",
            workload.sizes,
            median_ms=1.0,
            p20_ms=1.0,
            p80_ms=1.0,
        )

    monkeypatch.setattr(Bench, "measure", measured)
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)  # writing costs nothing
    monkeypatch.setattr(run, "chosen", lambda *arguments: [w for w in WORKLOADS if w.op == "softmax"])
    options = ["--device", "cpu", *(f"--{kind}={file}" for kind, file in files.items())]
    assert main(["bench", "softmax", *options]) == 130
    assert seen == [[False, False], [1, 1], [2, 2]]


def test_a_run_goes_on_after_what_its_file_has(tmp_path, capsys):
    file = tmp_path / "out.json"
    options = ["--device", "cpu", "--provider", "tileformer", "--json", str(file), "--resume"]
    assert main(["bench", "softmax", "--only", "N 256", *options]) == 0
    first = json.loads(file.read_text())["results"]
    capsys.readouterr()
    assert main(["bench", "softmax", "--only", "N", *options]) == 0
    rows = json.loads(file.read_text())["results"]
    assert rows[: len(first)] == first and len(rows) == len({(row["workload"], row["mode"]) for row in rows})
    for other, said in ((["--dtype", "bf16"], "has results of dtype float32, this is bfloat16"),):
        assert main(["bench", "softmax", *options, *other]) == 2
        assert said in capsys.readouterr().err
    assert main(["bench", "softmax", "--resume"]) == 2
    assert "name it with --json FILE" in capsys.readouterr().err


def test_plots_draw_every_sweep_and_the_roofline(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    figures = lambda w, mode, n: dict(median_ms=1.0, gbs=500.0 + n, tflops=float(n) if w.flops(mode) else None)  # noqa: E731
    rows = [
        dataclasses.asdict(Result(w.op, w.name, name, mode, "bfloat16", w.sizes, **figures(w, mode, n)))
        for w in WORKLOADS
        if w.curve in ("D 128 causal", "rows", "classes") or not w.axis
        for n, name in enumerate(("tileformer", "eager", "sdpa flash"), 100)
        for mode in w.modes
    ]  # fmt: skip
    report = dict(device="synthetic", dry=False, ceilings={"copy GB/s": 2500.0, "matmul TFLOP/s": 700.0}, results=rows)
    drawn = [os.path.basename(path) for path in plot.plot(report, str(tmp_path))]
    assert sorted(drawn) == sorted(os.listdir(tmp_path))
    assert set(drawn) >= {
        "attention__D_128_causal.png",
        "layer_norm__rows.png",
        "cross_entropy__classes.png",
        "roofline.png",
    }
    assert all((tmp_path / name).stat().st_size > 10_000 for name in drawn)


def test_the_search_keeps_the_fastest_right_tile(monkeypatch, capsys):
    shipped, now = tune.FORWARD[90, "plain"], []

    @contextlib.contextmanager
    def tile(bench, name, feature, size, row):
        now[:] = [row]
        yield

    times = {(128, 128, 8, 3): (1.0, ""), (128, 32, 4, 2): (0.5, "error is 7 times its budget")}
    monkeypatch.setattr(tune, "tile", tile)
    monkeypatch.setattr(tune, "Trial", lambda bench, workload, mode: lambda: times.get(now[0], (2.0, "")))
    monkeypatch.setattr(tune.device, "arch_of", lambda x: 90)
    bench = SimpleNamespace(device=CPU, clock=SimpleNamespace(dry=False, flush=None), deadline=float("inf"))
    tried = []
    with pytest.raises(KeyboardInterrupt):
        tune.search(
            bench, tried, lambda row: tried.append(row) if len(tried) < 10 else signal.raise_signal(signal.SIGINT)
        )
    turns = collections.Counter(row["table"] for row in tried)
    assert max(turns.values()) - min(turns.values()) <= 1, "forward and backward have had the same share"
    tried = json.loads(json.dumps(tried))  # as from a file
    tune.search(bench, tried, tried.append, sizes=(64,))
    printed = capsys.readouterr().out
    best = f'(90, "plain"): {{64: (128, 128, 8, 3), 128: {shipped[128]}, 256: {shipped[256]}}},'
    assert f"paste into FORWARD:\n    {best}" in printed
    assert "error is 7 times its budget" in printed
    every = [(t["table"], t["feature"], t["size"], *t["row"]) for t in tried]
    assert {t["table"] for t in tried} == set(tune.TABLES) and ("FORWARD", "plain", 64, *shipped[64]) in every
    assert len(set(every)) == len(every), "a trial was repeated"
    before = len(tried)
    tune.search(bench, tried, tried.append, only="DKDV plain 128")
    assert {(t["table"], t["feature"], t["size"]) for t in tried[before:]} == {("BACKWARD_DKDV", "plain", 128)}
    with pytest.raises(ValueError, match="no table, feature and head size has 'D 64' in its name"):
        tune.search(bench, tried, tried.append, only="D 64")


@pytest.mark.interprets
def test_a_change_reaches_the_kernel_or_raises():
    x = torch.randn(4, 256)
    with use_backend("interpret"):
        with tune.changed("_softmax_fwd_kernel", BLOCK_R=2):
            assert torch.allclose(softmax(x), x.softmax(-1))
        with (
            pytest.raises(RuntimeError, match="_softmax_bwd_kernel was not launched"),
            tune.changed("_softmax_bwd_kernel", BLOCK_R=2),
        ):
            softmax(x)
        with pytest.raises(Exception, match="power of 2"), tune.changed("_softmax_fwd_kernel", BLOCK_R=3):
            softmax(x)


def test_training_steps_of_both_sides_run(tmp_path):
    file = tmp_path / "step.json"
    assert main(["bench", "step", "--device", "cpu", "--threads", "1", "--rounds", "1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert {(row["model"], row["precision"]) for row in rows} == {(m, p) for m in step.MODELS for p in ("fp32", "bf16")}
    assert all(row["tileformer_ms"] > 0 and row["torch_nn_ms"] > 0 for row in rows)


def test_a_kernel_that_breaks_first_ends_no_search():
    def trial():
        return float("inf"), "OutOfMemoryError: no room"

    assert tune.attempt(trial, tune.changed("_softmax_fwd_kernel", BLOCK_R=2))[1].startswith(
        "OutOfMemoryError: no room; "
    )
    with pytest.raises(RuntimeError, match="was not launched"):
        tune.attempt(lambda: (1.0, ""), tune.changed("_softmax_fwd_kernel", BLOCK_R=2))


def test_gpu_day_survives_parts_that_fail_or_hang(tmp_path, monkeypatch, capsys):
    part = gpu_day.Part
    parts = (
        part("good", 30, ("platform",)),
        part("broken", 30, ("tileformer.no_such_module",)),
        part("hangs", 1, ("timeit", "-n", "1", "import time; time.sleep(60)")),
    )
    monkeypatch.setattr(gpu_day, "PARTS", parts)
    assert main(["bench", "gpu-day", "--dry", "--output", str(tmp_path)]) == 1
    report = (tmp_path / "report.md").read_text()
    assert "DRY RUN: NOT MEASURED" in report and "[good](logs/good.log) | done" in report
    assert "[broken](logs/broken.log) | FAILED (1)" in report and "[hangs](logs/hangs.log) | STOPPED" in report
    printed = capsys.readouterr().out
    assert "no part left results to draw" in printed and "FAILED: broken, hangs\n" in printed


def test_gpu_day_fits_its_25_minutes():
    assert sum(part.seconds for part in gpu_day.PARTS) + gpu_day.ENDING <= 60 * gpu_day.MINUTES
    measured = {part.name for part in gpu_day.PARTS}
    assert measured >= {*TIMED_OPS, "self-test", "check", "tests", "host", "step", "experiments"}
    numbers = {int(re.match(r"\d+", e.question)[0]) for e in tune.EXPERIMENTS}
    assert numbers == set(range(1, 13)) and all(bool(e.variants) != bool(e.reason) for e in tune.EXPERIMENTS)


def test_a_dry_run_executes_launches_experiments_and_the_report(tmp_path):
    """In a process of its own, because it installs the recording driver."""
    pytest.importorskip("matplotlib", reason="a dry run draws too")
    code = (
        "import sys; from tileformer.bench.speed import gpu_day; from tileformer.__main__ import main;"
        "keep = {'softmax': '9', 'experiments': '4'};"
        "gpu_day.PARTS = tuple(gpu_day.dataclasses.replace(p, dry=(*p.dry[:-1], keep[p.name])) for p in gpu_day.PARTS if p.name in keep);"
        "sys.exit(main(['bench', 'gpu-day', '--dry', '--output', sys.argv[1]]))"
    )
    path = os.pathsep.join([str(gpu_day.ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    report = (tmp_path / "report.md").read_text()
    assert "No time, rate or share on this page is a measurement" in report and "## Experiments" in report
    assert not re.search(r"\| \d+\.\d{4} \|", report), "a dry report shows a time"
    assert json.loads((tmp_path / "softmax.json").read_text())["dry"]


def test_floors_stand_on_each_other_in_order():
    """What a file of bench/ imports stands on its own floor or below: the order in bench/__init__.py."""
    order = ["calls", "tables", "recording", "ahead", "static", "check", "speed"]
    for path in (gpu_day.ROOT / "bench").rglob("*.py"):
        own = path.relative_to(gpu_day.ROOT / "bench").parts[0].removesuffix(".py")
        above = order[order.index(own) + 1 :] if own in order else []
        imported = set(re.findall(r"from tileformer\.bench(?:\.| import )(\w+)", path.read_text()))
        assert not imported & set(above), f"{path} imports {imported & set(above)}"
