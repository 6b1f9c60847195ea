"""load_matching: what fits is copied, everything else is named; nothing is silent."""

import dataclasses

import pytest
import torch

from tileformer.decoder import Classifier, DecoderLM, DecoderLMConfig, LoadReport, common_rows, load_matching

CONFIG = DecoderLMConfig(11, d_model=8, nhead=2, num_layers=2, dim_feedforward=16, max_length=6)


def model(seed, **changes):
    torch.manual_seed(seed)
    return DecoderLM(dataclasses.replace(CONFIG, **changes))


def test_the_same_model_is_loaded_whole():
    old, new = model(0), model(1)
    report = load_matching(new, old.state_dict())
    assert set(report.loaded) == set(new.state_dict())
    assert report.skipped == report.resized == report.initialised == ()
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))
    with torch.no_grad():
        old.embedding.weight.zero_()
    assert new.embedding.weight.any()  # a copy


def test_the_model_comes_first_everywhere(tmp_path):
    training = pytest.importorskip("tileformer.training")
    save_model = pytest.importorskip("safetensors.torch").save_model
    old, news = model(0), (model(1), model(2))
    save_model(old, str(tmp_path / "model.safetensors"))
    for load, new in zip((load_matching, training.load_weights), news, strict=True):
        load(new, str(tmp_path))
        assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))
    with pytest.raises(TypeError, match="the model first and then the path"):
        training.load_weights(tmp_path, old)


def test_a_language_model_becomes_a_classifiers_backbone():
    old, new = model(0), Classifier(model(1, num_layers=3), 2)
    head = new.head.linear.weight.clone()
    report = load_matching(new, old.state_dict(), rename={"": "backbone."})
    assert torch.equal(new.backbone.layers[1].linear1.weight, old.layers[1].linear1.weight)
    assert torch.equal(new.head.linear.weight, head)
    assert "head.linear.weight" in report.initialised and "backbone.layers.2.linear1.weight" in report.initialised
    assert set(report.loaded) | set(report.initialised) == set(new.state_dict()) and not report.skipped
    again = load_matching(new.backbone, old.state_dict())
    assert len(again.loaded) == len(report.loaded)


def test_the_longer_beginning_wins():
    old, new = model(0), model(1)
    names = {"layers.0.": "layers.1.", "layers.1.": "layers.0.", "layers.1.linear1.": "nowhere."}
    report = load_matching(new, old.state_dict(), rename=names)
    assert torch.equal(new.layers[1].linear1.weight, old.layers[0].linear1.weight)
    assert report.skipped == ("layers.1.linear1.weight", "layers.1.linear1.bias")
    assert report.initialised == ("layers.0.linear1.weight", "layers.0.linear1.bias")
    assert "skipped layers.1.linear1.bias: the model has no nowhere.bias" in str(report)


def test_another_vocabulary_is_left_alone_unless_rows_say_which():
    old, new = model(0), model(1, vocab=5)
    before = new.embedding.weight.clone()
    report = load_matching(new, old.state_dict())
    assert report.skipped == report.initialised == ("embedding.weight",)
    assert "it is (11, 8), the model's (5, 8)" in str(report)
    assert torch.equal(new.embedding.weight, before)

    rows = common_rows(["<pad>", "<bos>", *"abcdefghi"], ["<pad>", "x", "i", "b", "y"])
    assert rows.tolist() == [0, -1, 10, 3, -1]
    report = load_matching(new, old.state_dict(), rows={"embedding.weight": rows})
    assert report.resized == ("embedding.weight",) and report.initialised == ()
    assert torch.equal(new.embedding.weight[[0, 2, 3]], old.embedding.weight[[0, 10, 3]])
    assert torch.equal(new.embedding.weight[[1, 4]], before[[1, 4]])
    assert "3 of 5 rows" in str(report) and "\n" in str(report)
    alone = load_matching(new, {"embedding.weight": old.embedding.weight}, rows={"embedding.weight": rows})
    assert alone.resized == ("embedding.weight",) and not alone.loaded  # rows may be all that fits


def test_tensors_come_in_the_models_type_and_a_longer_position_table_by_rows():
    old, new = model(0).double(), model(1, max_length=9)
    rows = torch.tensor([0, 1, 2, 3, 4, 5, -1, -1, -1])
    load_matching(new, old.state_dict(), rows={"position.weight": rows})
    assert new.position.weight.dtype == torch.float32
    assert torch.equal(new.position.weight[:6], old.position.weight.float())


def test_tied_tensors_are_one():
    new = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3, bias=False), "b": torch.nn.Linear(3, 3, bias=False)})
    new["b"].weight = new["a"].weight
    report = load_matching(new, {"b.weight": torch.ones(3, 3)})
    assert new["a"].weight.sum() == 9
    assert report == LoadReport(("b.weight",), (), (), (), {})


def test_files_are_read(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="the train extra is not installed")
    old, new = model(0), model(1)
    safetensors.save_model(old, str(tmp_path / "model.safetensors"))
    for path in (tmp_path, tmp_path / "model.safetensors", str(tmp_path)):
        assert len(load_matching(new, path).loaded) == len(new.state_dict())
    assert torch.equal(new.norm.weight, old.norm.weight)
    with pytest.raises(FileNotFoundError, match="expected weights"):
        load_matching(new, tmp_path / "nothing")
    (tmp_path / "broken").write_bytes(b"\x10" * 40)
    with pytest.raises(ValueError, match="damaged"):
        load_matching(new, tmp_path / "broken")


W = "embedding.weight"
BAD = {
    "nothing fits": ("nothing fits DecoderLM.*'other'", {}, {"other": torch.zeros(2)}),
    "empty": ("found no tensors", {}, {}),
    "rows of no tensor": ("rows='head'", {"rows": {"head": torch.zeros(2)}}, None),
    "too few rows": (r"\(3,\) rows", {"rows": {W: torch.arange(3)}}, None),
    "rows beyond": ("rows up to 11", {"rows": {W: torch.arange(1, 12)}}, None),
    "one name for two": ("the same name, 'norm.weight'", {"rename": {"norm.bias": "norm.weight"}}, None),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_meant_is_refused_in_one_line(case):
    message, options, state = BAD[case]
    with pytest.raises(ValueError, match=message) as caught:
        load_matching(model(1), model(0).state_dict() if state is None else state, **options)
    assert "\n" not in str(caught.value)


def test_nothing_is_copied_before_everything_is_checked():
    old, new = model(0), model(1, vocab=5)
    before = {name: x.clone() for name, x in new.state_dict().items()}
    with pytest.raises(ValueError, match="do not fill"):
        load_matching(new, old.state_dict(), rows={"embedding.weight": torch.tensor([0, 1, 2, 3, 99])})
    assert all(torch.equal(x, before[name]) for name, x in new.state_dict().items())
    with pytest.raises(ValueError, match="meta device.*to_empty"):
        load_matching(new.to("meta"), old.state_dict())


def test_values_that_are_no_real_tensors_are_skipped():
    class Stateful(torch.nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    old, new = Stateful(3, 2), Stateful(3, 2)
    state = {**old.state_dict(), "bias": torch.ones(2, dtype=torch.complex64)}
    report = load_matching(new, state)
    assert report.loaded == ("weight",) and torch.equal(old.weight, new.weight)
    assert "bias: it is torch.complex64" in str(report) and "_extra_state" in report.skipped
