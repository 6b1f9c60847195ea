"""Stopped anywhere, a run ends with the same bits: kill -9 at random moments, a full disk, every optimiser and
schedule.

    python tests/test_training_resume.py FOLDER SEED MOMENTS

trains once undisturbed, then as often as asked with a kill at a random moment and a resume, all in FOLDER.
"""

import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("safetensors", reason="the train extra is not installed")

import tileformer
from tileformer.training import Batches, CheckpointError, Settings, checkpoint, fit, loop, process, sequence_loss

PAIRS = [([3 + i % 5, 4, 3 + i % 3], [3 + i % 4] * (1 + i % 3)) for i in range(60)]
# Everything that has a state of its own, in one run: 27 steps, seven epochs, a cut of the rate, two kept checkpoints.
# The learning rate is far too high, so that the valid loss goes up and down.
SETTINGS = Settings(
    2_400, lr=1.0, schedule="plateau", plateau_wait=1, precision="fp32", log_every=2, save_every=3, accumulate=2,
    valid_every="epoch", patience=9, keep_best=True, l1=1e-3,
)  # fmt: skip
FILES = {checkpoint.WEIGHTS, checkpoint.TRAINING, checkpoint.STATE}


class Tiny(nn.Module):
    """The next symbol from the present one and the mean of the source: milliseconds a run, and of the usual parts.

    Dropout makes the weights depend on every random state.
    """

    def __init__(self):
        super().__init__()
        self.source, self.target = nn.Embedding(8, 16), nn.Embedding(8, 16)
        self.norm, self.dropout, self.output = nn.LayerNorm(16), nn.Dropout(0.2), nn.Linear(16, 8)
        self.output.weight = self.target.weight

    def forward(self, source, target):
        x = self.target(target) + self.source(source).mean(1, keepdim=True)
        return self.output(self.dropout(self.norm(x)))


def build():
    torch.manual_seed(0)
    return Tiny()


def train(folder, loss_fn=sequence_loss, **changes):
    """Train, or continue what is in `folder`; returns the model and the report."""
    model, settings = build(), Settings(**(vars(SETTINGS) | changes))
    resume = bool(checkpoint.steps_in(folder))
    valid = Batches(PAIRS[:7], 4)
    report = fit(model, Batches(PAIRS, 8, seed=0), settings, loss_fn, folder=folder, valid=valid, resume=resume)
    return model, report


def outcome(folder):
    """All that a run leaves behind but the clock: its checkpoints' tensors and facts, and its curve."""
    kept = {path.name: facts(path) for path in checkpoint.steps_in(folder)}
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    clocks = ("core_seconds", "tokens_per_core_second")
    return kept, [{name: value for name, value in line.items() if name not in clocks} for line in lines]


def facts(path):
    """One checkpoint, which must be whole."""
    assert {file.name for file in path.iterdir()} == FILES
    state = checkpoint.read_state(path)
    for name in ("core_seconds", "wall_seconds"):
        del state[name]
    del state["last"]["tokens_per_core_second"]
    checkpoint.load_weights(build(), path)
    return state, (path / checkpoint.WEIGHTS).read_bytes(), (path / checkpoint.TRAINING).read_bytes()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def in_child(job, killed_after=None):
    """Run `job` in a fork of this process, and kill it after so many seconds; returns its exit status, and its time."""
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os._exit(job() or 0)
    if killed_after is not None:
        time.sleep(killed_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), time.perf_counter() - start


def limited(folder):
    """Train with a limit on the size of a file, set once the first checkpoint is on the disk; keeps what was raised."""
    import resource

    save = checkpoint.save

    def save_under_limit(*arguments, **options):
        if checkpoint.steps_in(folder):
            resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, resource.RLIM_INFINITY))
        return save(*arguments, **options)

    checkpoint.save = save_under_limit
    try:
        train(folder)
    except OSError as error:
        (folder / "refused.txt").write_text(str(error))


def proof(folder, seed, moments):
    """The runs of this file's second way of being called. Prints how often a kill came before the end."""
    torch.set_num_threads(1)
    train(folder / "warm")  # what torch does once, so that the children's moments are those of training
    assert in_child(lambda: limited(folder / "limited"))[0] == 0
    status, duration = in_child(lambda: train(folder / "whole") and None)
    assert status == 0
    chosen, killed = random.Random(seed), 0
    for moment in range(moments):
        run = folder / f"killed-{moment:02d}"
        status, _ = in_child(lambda run=run: train(run) and None, killed_after=chosen.uniform(0, duration))
        killed += status == -signal.SIGKILL
        for path in checkpoint.steps_in(run):
            facts(path)
        status, _ = in_child(lambda run=run: train(run) and None)
        assert status == 0, f"moment {moment}: the resumed run failed"
    print(killed)


def prove(folder, moments):
    """Call this file the second way, on any seed; returns how many of the moments came before the end."""
    paths = os.pathsep.join(str(Path(path).parent) for path in tileformer.__path__)
    # A process in which torch sees a GPU cannot fork after its first backward, even if that was the CPU's.
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, str(folder), str(random.randrange(10**9)), str(moments)]
    return int(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


@pytest.fixture(scope="module")
def proven(tmp_path_factory):
    """A few moments, and the run with the limit: one process for both, because it takes seconds to start."""
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    folder = tmp_path_factory.mktemp("proof")
    return folder, prove(folder, 3)


def same_ends(folder, killed):
    whole = outcome(folder / "whole")
    assert len(whole[0]) == 2  # the best and the last one
    runs = sorted(folder.glob("killed-*"))
    assert len(runs) / 2 <= killed  # else the moments prove nothing
    for run in runs:
        assert outcome(run) == whole, run.name


def test_a_run_killed_at_random_moments_ends_with_the_same_bits(proven):
    same_ends(*proven)


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_ends_with_the_same_bits(tmp_path):
    same_ends(tmp_path, prove(tmp_path, 20))


def test_the_systems_own_refusal_is_one_line_and_leaves_the_last_good_checkpoint(proven):
    folder = proven[0] / "limited"
    message = (folder / "refused.txt").read_text()
    assert ".partial-step-00000004" in message and "File too large" in message and "\n" not in message
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["step-00000003"]
    facts(folder / "step-00000003")


class Stop(Exception):
    """What ends a run in the middle here."""


def stopped(after):
    calls = 0

    def loss_fn(model, batch):
        nonlocal calls
        calls += model.training
        if calls > after:
            raise Stop
        return sequence_loss(model, batch)

    return loss_fn


PLAIN = {"schedule": "cosine", "patience": 0, "keep_best": False, "lr": 5e-3, "valid_every": "save"}


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "sgd", "accumulate": 1},
        {"optimizer": "sgd", "momentum": 0.0},
        {"optimizer": "rmsprop"},
        {"precision": "fp16"},
        {"precision": "bf16"},
        {"schedule": "inverse_sqrt", "valid_every": 7},
        {"schedule": "plateau", "valid_every": 1, "lr": 1.0, "floor": 0.01},
    ],
    ids=str,
)
def test_every_kind_of_run_resumes_to_the_same_bits(changes, tmp_path):
    train(tmp_path / "whole", **PLAIN | changes)
    for after in (17, 26):  # in the middle of a step where two batches make one; the second stop is of a resumed run
        with pytest.raises(Stop):
            train(tmp_path / "stopped", stopped(after if after == 17 else 10), **PLAIN | changes)
    train(tmp_path / "stopped", **PLAIN | changes)
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_patience_that_ended_a_run_ends_its_continuation_too(tmp_path):
    model, report = train(tmp_path, patience=1)
    again, repeated = train(tmp_path, patience=1)
    assert report.tokens < SETTINGS.tokens  # it was patience that ended it
    assert (repeated.steps, repeated.valid_loss) == (report.steps, report.valid_loss)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_checkpoint_from_before_a_setting_resumes_with_its_default(tmp_path):
    """The first format knew AdamW, one batch a step, two schedules, and validation at checkpoints."""
    first = (
        *("tokens", "lr", "schedule", "warmup", "decay", "floor", "betas", "weight_decay", "clip", "precision"),
        *("log_every", "save_every", "keep"),
    )
    simple = PLAIN | {"accumulate": 1, "l1": 0.0, "plateau_wait": Settings(1).plateau_wait}
    train(tmp_path / "whole", **simple)
    with pytest.raises(Stop):
        train(tmp_path / "old", stopped(20), **simple)
    file = checkpoint.latest(tmp_path / "old") / checkpoint.STATE
    state = json.loads(file.read_text())
    state["settings"] = {name: state["settings"][name] for name in first}
    for name in ("skipped", "best", "best_step", "validations_since_best", "plateau_factor", "scaler"):
        del state[name]
    file.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"settings accumulate=1; asked to resume with 2"):
        train(tmp_path / "old", **simple | {"accumulate": 2})
    train(tmp_path / "old", **simple)
    ((name, (_, *tensors)),) = outcome(tmp_path / "old")[0].items()
    ((same_name, (_, *expected)),) = outcome(tmp_path / "whole")[0].items()
    assert (name, tensors) == (same_name, expected)


@pytest.mark.parametrize("what", ["model", "training", "state", "flush", "rename"])
def test_a_full_disk_while_saving_leaves_the_last_good_checkpoint(what, tmp_path, monkeypatch):
    """Each thing that a save does refuses, the third time it is done in the run."""
    owner, name = {
        "model": (checkpoint, "save_weights"),
        "training": (checkpoint, "_save"),
        "state": (Path, "write_text"),
        "flush": (checkpoint, "_flush"),
        "rename": (checkpoint.os, "replace"),
    }[what]
    real, calls = getattr(owner, name), 0

    def full(*arguments, **options):
        nonlocal calls
        if any(".partial-step" in str(argument) for argument in arguments):
            calls += 1
            if calls > {"training": 5, "flush": 9}.get(what, 2):  # two files and four flushes a save
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, full)
    with pytest.raises(OSError, match="No space left on device"):
        train(tmp_path / "run")
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()] == ["step-00000004"]
    facts(tmp_path / "run" / "step-00000004")
    train(tmp_path / "run")
    train(tmp_path / "whole")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run leaves that nothing stopped."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(folder := tmp_path_factory.mktemp("whole"))
    torch.set_num_threads(threads)
    return outcome(folder)


def signalled(*numbers, after=9):
    """A loss in whose ninth call, inside of step 5, these signals come."""
    calls = itertools.count(1)

    def loss_fn(model, batch):
        if model.training and next(calls) == after:
            for number in numbers:
                signal.raise_signal(number)
        return sequence_loss(model, batch)

    return loss_fn


@pytest.mark.parametrize(
    "number, error, said",
    [
        (signal.SIGINT, KeyboardInterrupt, r"stopped at step 5; .*resume=True\) .*step-00000005"),
        (signal.SIGTERM, SystemExit, "143"),
    ],
)
def test_a_run_that_is_asked_to_stop_saves_this_step_and_goes_on_to_the_same_bits(
    number, error, said, whole, tmp_path, capfd
):
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(error, match=said):
        train(tmp_path, signalled(number))
    assert "this step is finished and saved first" in capfd.readouterr().err
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert [path.name for path in checkpoint.steps_in(tmp_path)][-1] == "step-00000005"
    train(tmp_path)
    assert outcome(tmp_path) == whole


def test_a_stop_in_the_middle_of_a_validation_is_saved_behind_it(tmp_path):
    asked = []

    def loss_fn(model, batch):
        if not model.training and not asked:
            asked.append(signal.raise_signal(signal.SIGINT))
        return sequence_loss(model, batch)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, loss_fn, **PLAIN | {"valid_every": 7, "save_every": 100})
    assert [path.name for path in checkpoint.steps_in(tmp_path)] == ["step-00000007"]


def test_a_second_interrupt_stops_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, signalled(signal.SIGINT, signal.SIGINT))
    assert checkpoint.steps_in(tmp_path)[-1].name == "step-00000004"  # a validation's


def test_without_a_folder_and_with_handlers_of_ones_own_signals_are_left_alone(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(build(), Batches(PAIRS, 8), Settings(2_400), signalled(signal.SIGINT))
    seen, before = [], signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        train(tmp_path, signalled(signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [1]


def test_saves_by_the_clock_cost_a_kill_one_step_and_change_nothing(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "AT_RISK", 0.0)
    monkeypatch.setattr(loop, "AT_RISK_SAVES", 0)
    train(tmp_path / "slow")
    assert outcome(tmp_path / "slow") == whole
    for at in (7, 10):  # the second stop is of a run that goes on from such a save
        with pytest.raises(Stop):
            train(tmp_path / "run", stopped(2 * (at if at == 7 else 3)))
        names = [path.name for path in checkpoint.steps_in(tmp_path / "run")]
        assert names[-1] == f"step-{at:08d}" and len(names) <= 3  # the best one, the periodic one, and it
    monkeypatch.undo()
    train(tmp_path / "run")
    assert outcome(tmp_path / "run") == whole


@pytest.mark.parametrize("save_seconds, expected", [(0.0, [8, 16, 24]), (5.0, [8, 21]), (35.0, [8])])
def test_the_clock_waits_for_a_minute_or_for_twenty_saves(save_seconds, expected, tmp_path, monkeypatch):
    """A step takes 7 seconds here, and a save as long as is said, which the first one cannot know."""
    now, steps = 0.0, []

    def passes(model, batch):
        nonlocal now
        now += 7.0
        return sequence_loss(model, batch)

    def save(folder, model, optimizer, state, **_):
        nonlocal now
        now += save_seconds
        steps.append(state["step"])
        return folder

    monkeypatch.setattr(loop.time, "monotonic", lambda: now)
    monkeypatch.setattr(checkpoint, "save", save)
    train(tmp_path, passes, **PLAIN | {"accumulate": 1, "save_every": 25, "tokens": 1_600, "schedule": "constant"})
    assert [step for step in steps if step < 25] == expected


def test_two_runs_do_not_share_a_folder(tmp_path):
    with process.lock(tmp_path), process.lock(tmp_path / "." / ""):  # of one thread: held already
        errors = []

        def other():
            try:
                train(tmp_path)
            except ValueError as error:
                errors.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert errors == [
        f"{tmp_path}: process {os.getpid()} is at work in it; wait until it has ended, or choose another folder"
    ]
    train(tmp_path, tokens=200)


if __name__ == "__main__":
    proof(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
