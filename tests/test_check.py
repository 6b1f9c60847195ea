"""`tileformer check` sees what it says it sees: for each fault, an op that has it, and the words that name it."""

import itertools
import json
import os

import pytest
import torch

from tileformer import __main__ as command
from tileformer import kernels
from tileformer.bench import tables
from tileformer.bench.ahead import announced
from tileformer.bench.calls import Call, describe, pairs
from tileformer.bench.calls.cases import CASES, DRAWS
from tileformer.bench.check import run as check
from tileformer.bench.check.memory import BAND, Memory

CPU = torch.device("cpu")
PLAIN = describe("softmax", "planted", "", 6, 10)


class _Softmax(torch.autograd.Function):
    """A right softmax, in memory of its own, but for what `fault(result, x, whether backward)` does, and for
    `unwritten` last elements."""

    fault = staticmethod(lambda y, x, backward: None)
    unwritten = (0, 0)

    @staticmethod
    def result(value, x, backward):
        y = torch.empty(x.shape, dtype=x.dtype)
        written = x.numel() - _Softmax.unwritten[backward]
        y.view(-1)[:written].copy_(value.view(-1)[:written])
        _Softmax.fault(y, x, backward)
        return y

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x)
        ctx.scale = scale
        return _Softmax.result((x.double() * scale).softmax(-1), x, False)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        y = (x.double() * ctx.scale).softmax(-1)
        return _Softmax.result(ctx.scale * y * (dy - (dy * y).sum(-1, keepdim=True)), x, True), None


def planted(monkeypatch, fault=lambda y, x, backward: None, unwritten=(0, 0), runs=2):
    """What `examine` finds in a softmax with a fault."""
    monkeypatch.setattr(_Softmax, "fault", staticmethod(fault))
    monkeypatch.setattr(_Softmax, "unwritten", unwritten)
    monkeypatch.setattr(kernels, "softmax", lambda x, *, scale=1.0: _Softmax.apply(x, scale))
    return check.examine(PLAIN, "fp32", "torch", CPU, runs)


def beyond(x, elements):
    """A view of x's memory that goes on for some elements."""
    return x.as_strided((x.numel() + elements,), (1,))


def test_a_right_op_passes(monkeypatch):
    found = planted(monkeypatch)
    assert found.passed and set(found.over_budget) == {"out", "dx"}


@pytest.mark.parametrize("backward", [False, True])
def test_a_wrong_result_is_named(monkeypatch, backward):
    found = planted(monkeypatch, lambda y, x, here: y[3].mul_(1.001) if here is backward else None)
    name, other = ("dx", "out") if backward else ("out", "dx")
    assert found.over_budget[name] > 1 and found.over_budget[other] < 1 and f"{name} is " in found.verdict


@pytest.mark.parametrize(("unwritten", "name"), [((1, 0), "out"), ((0, 1), "dx")])
def test_an_element_that_is_never_written_is_named(monkeypatch, unwritten, name):
    found = planted(monkeypatch, unwritten=unwritten)
    assert found.problems[0].startswith(f"{name}: some element was never written"), found.problems


def test_a_read_beyond_an_input_is_named(monkeypatch):
    found = planted(monkeypatch, lambda y, x, backward: y[0, 0].add_(beyond(x, 1)[-1] * 0))
    assert "out: what lies outside an input reaches it" in found.problems


def test_a_write_outside_an_output_is_named(monkeypatch):
    found = planted(monkeypatch, lambda y, x, backward: beyond(y, 3)[-3:].zero_() if backward else None)
    assert found.problems == ["wrote 12 bytes outside a tensor of shape (6, 10)"]


def test_a_write_into_an_input_is_named(monkeypatch):
    found = planted(monkeypatch, lambda y, x, backward: x.data[0, :2].zero_() if backward else None)
    assert found.problems == ["wrote 8 bytes into or around an input of shape (6, 10)"]


def test_results_that_change_from_run_to_run_are_named(monkeypatch):
    count = itertools.count()  # two results a run
    found = planted(monkeypatch, lambda y, x, backward: y.mul_(1 + 1.2e-7 * (next(count) // 2 % 2)))
    assert max(found.over_budget.values()) <= 1
    assert found.problems == ["out: another run gave other bits", "dx: another run gave other bits"]


def test_an_error_is_a_finding(monkeypatch):
    monkeypatch.setattr(kernels, "softmax", lambda x: 1 / 0)
    found = check._finding(PLAIN, "fp32", "torch", CPU)
    assert found.problems == ["ZeroDivisionError: division by zero"] and not found.passed


def _drawing(keep_of):
    """A dropout with chosen bits: keep_of(seed, shape) -> boolean; `None` seeds come from torch's generator."""

    def dropout(x, p, *, seed=None, residual=None):
        seed = torch.randint(2**62, (1,)) if seed is None else seed
        return x * keep_of(int(seed), x.shape) / (1 - p)

    return dropout


def _bits(seed, shape, p=0.1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= p


CALLS = itertools.count()
DRAW = Call("dropout", "planted", options=dict(p=0.1), draws=True)
DRAWN_WRONG = {
    "biased": (lambda seed, shape: _bits(seed, shape, 0.115), "rate"),
    "rows alike": (lambda seed, shape: _bits(seed, (shape[0] // 2, shape[1])).repeat_interleave(2, 0), "rows"),
    "columns alike": (lambda seed, shape: _bits(seed, (shape[0], shape[1] // 2)).repeat_interleave(2, 1), "columns"),
    "calls alike": (lambda seed, shape: _bits(1, shape), "calls"),
    "not rescaled": (lambda seed, shape: _bits(seed, shape) * 0.9, "mean"),
    "no replay": (lambda seed, shape: _bits(next(CALLS), shape), "the same seed gave other bits"),
    "other bits": (lambda seed, shape: _bits(seed, shape), "other elements are kept"),
}


@pytest.mark.parametrize("fault", DRAWN_WRONG)
def test_wrong_dropout_is_named(monkeypatch, fault):
    keep_of, name = DRAWN_WRONG[fault]
    monkeypatch.setattr(kernels, "dropout", _drawing(keep_of))
    found = check.examine_draws(DRAW, "fp32", "interpret", CPU)
    assert not found.passed and name in found.verdict, found.verdict


def test_a_backward_with_bits_of_its_own_is_named(monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * _bits(1, x.shape) / 0.9

        @staticmethod
        def backward(ctx, dy):
            return dy * _bits(2, dy.shape) / 0.9

    monkeypatch.setattr(kernels, "dropout", lambda x, p, *, seed=None: Wrong.apply(x))
    found = check.examine_draws(DRAW, "fp32", "torch", CPU)
    assert "the backward drops other elements than the forward" in found.problems


@pytest.mark.interprets
@pytest.mark.parametrize("case", [c for c in CASES if c.quick], ids=lambda c: f"{c.op}-{c.name}")
def test_what_an_op_returns_was_guarded(case):
    """Memory.ALLOCATORS knows how the ops allocate: a result outside guarded memory would be checked for nothing."""
    memory = Memory(CPU)
    with kernels.use_backend("interpret"):
        got, _ = check.results_of(kernels, case, torch.float32, CPU, torch.float32, memory)
    guarded = {memory_.untyped_storage().data_ptr() for memory_, *_ in memory.outputs}
    made_by_torch = {"cross_entropy": {"out"}, "attention": {"lse"}, "dropout": {"dresidual"}}.get(case.op, set())
    for name in set(got) - made_by_torch:
        assert got[name].untyped_storage().data_ptr() in guarded, name


def test_placed_tensors_keep_their_strides_and_lie_between_nan():
    x = torch.arange(12.0).view(3, 4)
    for like in (x, x.t().contiguous().t(), x[:1].expand(3, 4), torch.zeros(13)[1:].view(3, 4)):
        memory = Memory(CPU)
        value = like.clone() if like.stride(0) == 0 else x
        placed = memory.place(value, like)
        assert torch.equal(placed, value) and placed.stride() == like.stride()
        assert placed.data_ptr() % 16 == 4 * (like.storage_offset() % 4)
        assert (
            beyond(placed, 1)[-1].isnan() and placed.as_strided((1,), (1,), placed.storage_offset() - 1).isnan().all()
        )
    far = Memory(CPU).place(x, far=0)
    assert torch.equal(far, x) and (far.data_ptr() - far[-1].data_ptr()) // -4 >= 2**31 and BAND >= 2**16


# The command


def run(*words):
    return command.main(["check", "--device", "cpu", "--backend", "torch", *words])


def test_the_reports_can_be_attached_to_a_bug(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(_Softmax, "fault", staticmethod(lambda y, x, backward: y.mul_(1.5) if backward else None))
    monkeypatch.setattr(kernels, "softmax", lambda x, *, scale=1.0, mask=None, causal=False: _Softmax.apply(x, scale))
    markdown, data = tmp_path / "report.md", tmp_path / "report.json"
    words = ["--op", "softmax", "--op", "layer_norm", "--quick", "--dtype", "fp32"]
    assert run(*words, "--report", str(markdown), "--json", str(data)) == 1
    shown = capsys.readouterr().out
    assert "FAILED: dx is " in shown and shown.splitlines()[-1].startswith("1 passed, 1 failed in ")
    found = json.loads(data.read_text())
    assert found["environment"]["torch"] == torch.__version__ and found["environment"]["backend"] == "torch"
    failed, passed = found["calls"]
    assert (failed["op"], failed["passed"], passed["op"], passed["passed"]) == ("softmax", False, "layer_norm", True)
    assert set(passed["over_budget"]) == {"out", "dx", "dweight", "dbias"}
    text = markdown.read_text()
    command_line = 'tileformer check --op softmax --case "plain" --dtype fp32 --backend torch --device cpu'
    assert failed["command"] == command_line and f"    {command_line}\n" in text
    assert text.index("## softmax, plain, fp32") < text.index("| ok | layer_norm | model width | fp32 |")
    assert f"| torch | {torch.__version__} |" in text


def test_a_report_grows_and_outlives_a_stop(monkeypatch, capsys, tmp_path):
    """What stands on the disk when a call begins is whole and tells of all before it; Ctrl-C loses nothing."""
    markdown, data, find, seen = tmp_path / "r.md", tmp_path / "r.json", check._finding, []

    def watched(item, dtype, backend, device):
        if data.exists():
            seen.append((json.loads(data.read_text()), markdown.read_text()))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return find(item, dtype, backend, device)

    monkeypatch.setattr(check, "_finding", watched)
    monkeypatch.setattr(tables.time, "monotonic", lambda: 0.0)  # writing costs nothing
    (tmp_path / "link").symlink_to(markdown)
    assert run("--op", "layer_norm", "--report", str(tmp_path / "link"), "--json", str(data)) == 130
    assert (
        not capsys.readouterr().err
        and [len(found["calls"]) for found, _ in seen] == [1, 2]
        and (tmp_path / "link").is_symlink()
    )
    assert seen[1][0]["passed"] == 2 and seen[1][0]["not_reached"] == json.loads(data.read_text())["not_reached"] > 2
    assert "2 passed, 0 failed, " in seen[1][1] and " not reached in " in markdown.read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"r.md", "r.json", "link"}


def test_a_growing_file_costs_a_twentieth_of_the_time(monkeypatch, tmp_path):
    now, written, path = [0.0], [], str(tmp_path / "x")

    def text():
        now[0] += 1.0
        return written.append(now[0]) or str(len(written))

    monkeypatch.setattr(tables.time, "monotonic", lambda: now[0])
    growing = tables.Growing(path, text)
    for _ in range(100):
        growing.write()
        now[0] += 1.0
    assert len(written) == 5
    growing.write(last=True)
    assert (tmp_path / "x").read_text() == "6"
    device = tables.Growing("/dev/null", text)
    device.write()
    device.write(last=True)
    assert len(written) == 7 and not os.path.isfile("/dev/null")


def test_an_architecture_is_a_number_or_a_name(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(check.compiled, "main", lambda calls, archs, output: asked.append(archs) or 0)
    assert command.main(["check", "--compile-only", "--arch", "90", "sm_90", "SM90a", "compute_90", "9.0", "12.0"]) == 0
    assert asked == [[90, 90, 90, 90, 90, 120]]


def test_a_backend_that_cannot_serve_the_device_is_refused(capsys):
    assert command.main(["check", "--backend", "triton", "--device", "cpu"]) == 2
    shown = capsys.readouterr()
    assert "triton is for cuda, interpret for cpu" in shown.err and not shown.out


def test_all_prints_a_table_of_features(capsys):
    assert run("--op", "attention", "--all", "--case", "pairs 1", "--dtype", "bf16") == 0
    first, shown = pairs.ROWS[0], capsys.readouterr().out
    cells = {line[:34].strip(): line[34:].split()[0] for line in shown.splitlines() if len(line) > 80}
    assert 0.0 < float(cells[first["diagonal"]]) <= 1.0
    assert cells[next(level for level in pairs.FACTORS["diagonal"] if level != first["diagonal"])] == "-"


def test_json_can_take_the_place_of_the_table(capsys):
    assert run("--quick", "--op", "layer_norm", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["passed"] == 1


@pytest.mark.interprets
def test_the_report_names_the_tiles(tmp_path):
    report = tmp_path / "report.md"
    words = [
        "check",
        "--device",
        "cpu",
        "--backend",
        "interpret",
        "--quick",
        "--op",
        "softmax",
        "--report",
        str(report),
    ]
    assert command.main(words) == 0
    assert "| _softmax_fwd_kernel | BLOCK_R 32, BLOCK_N 64, num_warps 4 |" in report.read_text()


def test_one_call_can_be_asked_for(capsys):
    assert run("--case", "row of -inf", "--case", "one row", "--op", "softmax", "--dtype", "bf16") == 0
    shown = capsys.readouterr().out
    assert "1 passed, 0 failed, 1 skipped" in shown and "skipped: NaN there, as in torch" in shown
    assert run("--case", "no such call") == 2
    assert "row of -inf" in capsys.readouterr().err


def test_a_gpu_compiles_few_kernels_for_the_quick_calls_and_for_the_tests():
    """--quick promises 26; the tests may compile 120 in all, and other files need some."""
    with announced(90) as kernels_to_compile:
        for item in (item for item in CASES if item.quick):
            check._uncomputed(item, "bf16")
        quick = len(kernels_to_compile)
        for item in [*CASES, *DRAWS]:
            for name in [d for d in item.dtypes if d != "fp16"] if item.quick else item.dtypes[: item.suite]:
                check._uncomputed(item, name)
    assert 6 <= quick <= 26 and 60 <= len(kernels_to_compile) <= 106, (quick, len(kernels_to_compile))
