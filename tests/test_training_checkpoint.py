"""Checkpoints: a killed run resumes to the same bits, nothing is ever half-written, and damage is named in one line."""

import dataclasses
import itertools
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

import safetensors.torch

import tileformer
from tileformer.decoder import Seq2Seq, Seq2SeqConfig
from tileformer.training import (
    Batches,
    CheckpointError,
    Settings,
    checkpoint,
    fit,
    latest,
    load_weights,
    read_state,
    sequence_loss,
)

CONFIG = Seq2SeqConfig(8, 8, 16, 2, 1, 1, 32, dropout=0.2, max_length=8)
PAIRS = [([3 + i % 5, 4, 3 + i % 3], [3 + i % 4] * (1 + i % 3)) for i in range(60)]
SETTINGS = Settings(2_400, precision="fp32", log_every=3, save_every=5)  # 27 steps, seven epochs


def train(folder, loss_fn=sequence_loss, **changes):
    """A tiny model with dropout, so that the weights depend on every random state."""
    torch.manual_seed(0)
    model = Seq2Seq(CONFIG)
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
        load_weights(other, copy)


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
    """Each file, then the hidden folder's names, then the run folder's, in which the checkpoint has its name by
    then."""
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


def edit_state(path, change):
    """Change what state.json of a checkpoint says: `change(state)` in place, or the text that replaces it."""
    file = path / "state.json"
    state = json.loads(file.read_text())
    if not isinstance(change, str):
        change(state)
    file.write_text(change if isinstance(change, str) else json.dumps(state))


def put(where, name, value):
    return lambda state: (state if where is None else state[where]).update({name: value})


@pytest.mark.parametrize(
    "change, named",
    [
        (put(None, "step", None), "expected step as int, found None"),
        (put(None, "step", 26), "expected the step of step-00000027, found step 26"),
        (put(None, "tokens", -3000), "tokens must not be below 0, got -3000"),
        (put(None, "tokens", True), "expected tokens as int, found True"),
        (put(None, "plateau_factor", float("nan")), "expected plateau_factor as float, found nan"),
        (put(None, "plateau_factor", 2), r"plateau_factor must be in \(0, 1\], got 2"),
        (put(None, "best_step", [5]), r"expected best_step as int \| None"),
        (put(None, "pending_steps", 99), "longer than its 27 steps"),
        (put(None, "last", {"loss": "x"}), "expected the loss of the last line as a number, found 'x'"),
        (put(None, "settings", [1]), "expected settings as dict"),
        (put(None, "settings", {}), "settings: tokens is missing"),
        (put("settings", "plateau_factor", float("nan")), "expected plateau_factor as float, found nan"),
        (put("settings", "betas", [0.9]), "expected betas as tuple"),
        (put("settings", "keep_best", "false"), "expected keep_best as bool, found 'false'"),
        (put("settings", "speed" * 1000, 1), "no field 'speedspeed"),
        (put(None, "meta", None), "expected meta as an object, found None"),
        (put("meta", "recipe", "z" * 5000), "meta recipe='zzz"),
        (put(None, "data", None), "expected data as dict"),
        (put("data", "index", "0"), "expected index from 0 on, found '0'"),
        (lambda state: state["data"].pop("seed"), "seed was None, is 0"),
        (put(None, "nonsense", 1), "no field 'nonsense' is known"),
        ("[1, 2]", "expected format"),
        ("[" * 100_000, "nested too deeply"),
        ('{"format": "tileformer checkpoint 1"}', "a model that is ready for use"),
    ],
)
def test_a_wrong_field_is_named_in_one_line(change, named, copy):
    edit_state(copy, change)
    with pytest.raises(CheckpointError, match=named) as caught:
        train(copy.parent, resume=True)
    message = str(caught.value)
    assert str(copy) in message and "\n" not in message and len(message) < 500 + len(str(copy))


def test_a_place_behind_the_end_of_an_epoch_is_refused(copy):
    edit_state(copy, lambda state: (state["data"].update(index=10**6), state.update(tokens=1)))
    with pytest.raises(ValueError, match="1,000,000 of the epoch's 4 items"):
        train(copy.parent, resume=True)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"d_model": 10**9}, "d_model 1,000,000,000 is more than the"),
        ({"num_encoder_layers": 10**9}, "num_encoder_layers 1,000,000,000 is more than the 1,000"),
        ({"num_encoder_layers": 2}, "it has no transformer.encoder.layers.1"),
        ({"num_encoder_layers": 2.5}, "expected num_encoder_layers as int, found 2.5"),
        ({"norm_first": "false"}, "expected norm_first as bool, found 'false'"),
        ({"dropout": None}, "expected dropout as float, found None"),
        ({"nhead": 3}, "meta model: .*3"),
        ({"dim_feedforward": 16}, r"is float32 \(32, 16\) in the file and float32 \(16, 16\) in the model"),
        ({"colour": 1}, "no field 'colour' is known"),
        ({"src_vocab": ...}, "src_vocab is missing"),
        ([], "meta model: expected an object, found"),
    ],
    ids=str,
)
def test_a_configuration_is_held_against_the_weights_before_anything_is_built(change, named, copy, monkeypatch):
    config = dataclasses.asdict(CONFIG)
    config = {name: x for name, x in (config | change).items() if x is not ...} if change else change
    edit_state(copy, put("meta", "model", config))
    built = []
    monkeypatch.setattr(torch.nn.init, "normal_", lambda x, *_, **__: built.append(x.device.type) or x)
    with pytest.raises(CheckpointError, match=named) as caught:
        checkpoint.build(copy, Seq2SeqConfig, Seq2Seq)
    assert str(copy) in str(caught.value) and set(built) <= {"meta"}


def test_a_right_configuration_builds_the_model(finished, copy):
    edit_state(copy, put("meta", "model", dataclasses.asdict(CONFIG)))
    weights = checkpoint.build(copy, Seq2SeqConfig, Seq2Seq).state_dict()
    assert all(torch.equal(weights[name], finished[1][name]) for name in finished[1])


def edit_tensors(file, change):
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file)


EMBEDDING, MOMENT = "src_embedding.weight", "optimizer/src_embedding.weight/exp_avg"


@pytest.mark.parametrize(
    "name, change, named",
    [
        ("model", lambda x: x.update({k: v * float("nan") for k, v in x.items()}), "holds numbers that are not finite"),
        ("model", lambda x: x[EMBEDDING][0, 0].fill_(float("inf")), f"{EMBEDDING} holds numbers that are not finite"),
        ("model", lambda x: x.update({EMBEDDING: x[EMBEDDING].long()}), f"{EMBEDDING} is int64 .* in the file"),
        ("model", lambda x: x.update({EMBEDDING: x[EMBEDDING] + 0j}), f"{EMBEDDING} is complex64 .* in the file"),
        ("model", lambda x: x.update(more=torch.ones(1)), "the model has no 'more'"),
        ("model", lambda x: x.pop(EMBEDDING), f"it has no {EMBEDDING}"),
        ("training", lambda x: x[MOMENT].fill_(float("nan")), "exp_avg of src_embedding.weight holds NaN"),
        ("training", lambda x: x.update({MOMENT: x[MOMENT][1:].clone()}), "expected exp_avg of src_embedding.weight"),
        ("training", lambda x: x.update({MOMENT: x[MOMENT].long()}), "expected exp_avg of src_embedding.weight"),
        ("training", lambda x: x.pop(MOMENT), r"expected \['exp_avg', 'exp_avg_sq', 'step'\] of src_embedding.weight"),
        ("training", lambda x: x.update({"optimizer/a/b/step": torch.ones(())}), "it has none named 'a/b'"),
        ("training", lambda x: x.update({"random/torch/cpu": torch.ones(9, dtype=torch.uint8)}), r"found .*\(9,\)"),
        ("training", lambda x: x.pop("random/torch/cpu"), "found none"),
        ("training", lambda x: x["random/torch/cpu"].fill_(255), "expected the states of torch's generators"),
    ],
)
def test_wrong_tensors_are_named_in_one_line(name, change, named, copy):
    edit_tensors(copy / f"{name}.safetensors", change)
    with pytest.raises(CheckpointError, match=named) as caught:
        train(copy.parent, resume=True)
    assert f"{name}.safetensors" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["weights", "state", "numbers"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_last_good_one(damage, finished, tmp_path):
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, failing(12), keep=2)
    good, bad = checkpoint.steps_in(tmp_path)
    if damage == "weights":
        (bad / "model.safetensors").write_bytes((bad / "model.safetensors").read_bytes()[:-100])
    elif damage == "state":
        edit_state(bad, put(None, "step", None))
    else:
        edit_tensors(bad / "model.safetensors", lambda x: x[EMBEDDING].fill_(float("nan")))
    with pytest.warns(UserWarning, match=f"{bad}.*; {good.name}, the last good checkpoint, is used instead"):
        assert latest(tmp_path) == good
    with pytest.warns(UserWarning, match="the last good checkpoint"):
        weights = train(tmp_path, resume=True, keep=2).state_dict()
    assert all(torch.equal(weights[name], finished[1][name]) for name in finished[1])
    assert [path.name for path in checkpoint.steps_in(tmp_path)] == ["step-00000025", "step-00000027"]
    for path in (good, bad):
        assert not path.exists()


def test_a_reader_beside_a_run_that_saves_finds_what_was_saved(copy, monkeypatch):
    check = checkpoint.check

    def overtaken(path):
        if path == copy:
            edit_state(copy, put(None, "step", 28))
            copy.rename(copy.with_name("step-00000028"))
        check(path)

    monkeypatch.setattr(checkpoint, "check", overtaken)
    assert latest(copy.parent) == copy.with_name("step-00000028")


def failing(after):
    calls = itertools.count(1)
    return lambda model, batch: sequence_loss(model, batch) if next(calls) <= after else 1 / 0


def test_files_have_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        train(tmp_path, tokens=100)
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in latest(tmp_path).iterdir()}
    assert modes == dict.fromkeys(("model.safetensors", "training.safetensors", "state.json"), 0o640)


if __name__ == "__main__":
    child(Path(sys.argv[1]), sys.argv[2])
