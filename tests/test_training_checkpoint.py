"""Checkpoints: a killed run resumes to the same bits, nothing is ever half-written, and damage is named in one line."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors", reason="the train extra is not installed")

import tileformer
from tileformer.decoder import Seq2Seq, Seq2SeqConfig
from tileformer.training import Batches, CheckpointError, Settings, checkpoint, fit, latest, load_weights, read_state
from tileformer.training.loop import sequence_loss

PAIRS = [([3 + i % 5, 4, 3 + i % 3], [3 + i % 4] * (1 + i % 3)) for i in range(60)]
SETTINGS = Settings(2_400, precision="fp32", log_every=3, save_every=5)  # 27 steps, seven epochs


def train(folder, loss_fn=sequence_loss, **changes):
    """A tiny model with dropout, so that the weights depend on every random state."""
    torch.manual_seed(0)
    model = Seq2Seq(Seq2SeqConfig(8, 8, 16, 2, 1, 1, 32, dropout=0.2, max_length=8))
    resume, overwrite = changes.pop("resume", False), changes.pop("overwrite", False)
    meta = changes.pop("meta", {"recipe": "test"})
    settings = Settings(**(vars(SETTINGS) | changes))
    fit(
        model,
        Batches(PAIRS, 16, seed=0),
        settings,
        loss_fn,
        folder=folder,
        resume=resume,
        overwrite=overwrite,
        meta=meta,
    )
    return model


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = train(folder)
    torch.set_num_threads(threads)
    return folder, model.state_dict()


@pytest.fixture
def copy(finished, tmp_path):
    """A checkpoint of its own to damage."""
    return Path(shutil.copytree(latest(finished[0]), tmp_path / "run" / "step-00000027"))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def child(folder, where):
    """Train until killed: inside step 13, while the second checkpoint is written, or while the first is removed."""
    torch.set_num_threads(1)
    calls = 0

    def counted(model, batch):
        nonlocal calls
        calls += 1
        if where == "step" and calls == 13:
            die()
        return sequence_loss(model, batch)

    if where == "write":
        flush = checkpoint._flush
        checkpoint._flush = lambda path: die() if calls == 10 and path.name == checkpoint.TRAINING else flush(path)
    if where == "remove":
        shutil.rmtree = lambda path: (Path(path) / checkpoint.STATE).unlink() or die()
    train(folder, counted)


@pytest.mark.parametrize("where, resumed_at", [("step", 10), ("write", 5), ("remove", 10)])
def test_a_killed_run_resumes_to_the_same_bits(where, resumed_at, finished, tmp_path):
    paths = os.pathsep.join(str(Path(path).parent) for path in tileformer.__path__)
    run = subprocess.run([sys.executable, __file__, tmp_path, where], env=os.environ | {"PYTHONPATH": paths})
    assert run.returncode == -signal.SIGKILL
    assert read_state(latest(tmp_path))["step"] == resumed_at

    folder, expected = finished
    weights = train(tmp_path, resume=True).state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["step-00000027"]

    def curve(path):  # what was measured of the training, without the clock
        lines = map(json.loads, (path / "log.jsonl").read_text().splitlines())
        return [(line["step"], line["tokens"], line["loss"], line["lr"]) for line in lines]

    assert curve(tmp_path) == curve(folder)
    assert (latest(tmp_path) / "model.safetensors").read_bytes() == (latest(folder) / "model.safetensors").read_bytes()


def test_resuming_a_finished_run_trains_no_further(finished):
    weights = train(finished[0], resume=True).state_dict()
    assert all(torch.equal(weights[name], finished[1][name]) for name in weights)


def test_another_thread_count_warns(copy):
    state = json.loads((copy / "state.json").read_text())
    (copy / "state.json").write_text(json.dumps(state | {"threads": 7}))
    with pytest.warns(UserWarning, match="trained with 7 threads, this process has 1"):
        train(copy.parent, resume=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lr": 1e-2}, r"settings lr=0.0015; asked to resume with 0.01"),
        ({"tokens": 9_000}, r"settings tokens=2400; asked to resume with 9000"),
        ({"meta": {"recipe": "other"}}, r"meta recipe='test'; asked to resume with 'other'"),
    ],
    ids=str,
)
def test_another_run_than_the_checkpoints_is_refused(change, message, copy):
    with pytest.raises(CheckpointError, match=message):
        train(copy.parent, resume=True, **change)


def test_how_often_to_save_may_change(copy):
    train(copy.parent, resume=True, save_every=7, log_every=1)


def test_a_run_is_not_overwritten_by_accident(copy):
    with pytest.raises(CheckpointError, match="a run is already here"):
        train(copy.parent)
    (other := copy.with_name("step-00009999")).mkdir()
    train(copy.parent, overwrite=True)
    assert copy.exists() and not other.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing"])
def test_damage_is_named_in_one_line(name, damage, copy):
    file = copy / name
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.write_bytes(b'{"epoch": 3}')
    with pytest.raises(CheckpointError) as caught:
        train(copy.parent, resume=True)
    message = str(caught.value)
    assert name in message and "expected" in message and "\n" not in message


def test_a_state_of_another_format_is_refused(copy):
    state = json.loads((copy / "state.json").read_text())
    (copy / "state.json").write_text(json.dumps(state | {"format": "tileformer checkpoint 99"}))
    with pytest.raises(
        CheckpointError, match="expected format 'tileformer checkpoint 1', found 'tileformer checkpoint 99'"
    ):
        train(copy.parent, resume=True)


def test_weights_of_another_model_are_refused(copy):
    other = Seq2Seq(Seq2SeqConfig(9, 8, 16, 2, 1, 1, 32, max_length=8))
    with pytest.raises(CheckpointError, match=r"model.safetensors: expected the weights of Seq2Seq; .*src_embedding"):
        load_weights(copy, other)


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_a_path_without_a_checkpoint_says_what_was_expected(kind, tmp_path):
    path = tmp_path / "run"
    if kind == "empty":
        path.mkdir()
    elif kind == "file":
        path.write_text("x")
    with pytest.raises(CheckpointError, match=r"run: expected a checkpoint with state.json"):
        latest(path)
    if kind != "file":
        with pytest.raises(CheckpointError, match="expected a checkpoint"):
            train(path, resume=True)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    calls = []

    def full(path):
        calls.append(path)
        if len(calls) > 8:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_flush", full)
    with pytest.raises(OSError, match="No space left"):
        train(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["step-00000005"]
    monkeypatch.undo()
    train(tmp_path, resume=True)


def test_what_is_written_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    """Each file, then the hidden folder's names, then the run folder's, in which the checkpoint has its name by then."""
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda number: flushed.append(os.readlink(f"/proc/self/fd/{number}")) or fsync(number)
    )
    model = torch.nn.Linear(2, 2)
    final = checkpoint.save(tmp_path, model, torch.optim.AdamW(model.parameters()), {"step": 7})
    names = [Path(path).name for path in flushed]
    assert {"model.safetensors", "training.safetensors", "state.json"} <= set(names)
    assert flushed[-1] == str(tmp_path) and final.name in names[-2]


def test_checkpoints_come_in_the_order_of_their_steps(tmp_path):
    steps = list(range(0, 900, 20))
    random.Random(0).shuffle(steps)
    for step in steps:
        (tmp_path / f"step-{step:08d}").mkdir()
    assert [path.name for path in checkpoint.steps_in(tmp_path)] == [f"step-{step:08d}" for step in sorted(steps)]


def test_the_state_of_another_models_optimizer_is_refused(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    path = checkpoint.save(tmp_path, model, optimizer, {"step": 1})
    other = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="none named 'bias'"):
        checkpoint.load_training(path, other, torch.optim.AdamW(other.parameters()))


def test_keep_keeps_the_newest(tmp_path):
    train(tmp_path, keep=2)
    assert [path.name for path in checkpoint.steps_in(tmp_path)] == ["step-00000025", "step-00000027"]


if __name__ == "__main__":
    child(Path(sys.argv[1]), sys.argv[2])
