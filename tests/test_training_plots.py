"""Plots are PNGs of the data given, also where no font has the characters."""

import json
import re

import numpy
import pytest
import torch

from tileformer.training.finetune import plots

image = pytest.importorskip("matplotlib.image", reason="the finetune extra is not installed")


@pytest.fixture
def drawn(monkeypatch):
    """The figure of each plot, as it was saved."""
    figures = []
    save = plots.save
    monkeypatch.setattr(plots, "save", lambda figure, png: figures.append(figure) or save(figure, png))
    return figures


def is_png(path):
    """A picture with a white edge: nothing that was drawn is cut there."""
    pixels = image.imread(path)[..., :3]
    edge = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
    return path.stat().st_size > 2000 and all((line == 1).all() for line in edge)


def test_learning_curves_show_the_log(tmp_path, drawn):
    log = tmp_path / "log.jsonl"
    records = [{"step": i, "tokens": 100 * i, "loss": 3.0 / i, "lr": 1e-3} for i in range(1, 9)]
    records[3]["valid_loss"] = 1.5
    log.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 9, "tok')
    assert is_png(plots.learning_curves(log, tmp_path / "new" / "curves.png"))
    losses, rates = drawn[0].axes
    training, validation = losses.get_lines()
    assert list(training.get_xdata()) == [100 * i for i in range(1, 9)]
    assert list(training.get_ydata()) == [3.0 / i for i in range(1, 9)]
    assert (list(validation.get_xdata()), list(validation.get_ydata())) == ([400], [1.5])
    assert len(rates.get_lines()) == 1


def test_confusion_shows_counts_and_shares_of_the_row(tmp_path, drawn):
    counts = numpy.array([[30, 10], [0, 0]])  # a class without examples has no shares
    assert is_png(plots.confusion(counts, ["bad", "good"], tmp_path / "c.png"))
    (panel,) = drawn[0].axes
    assert [text.get_text() for text in panel.texts] == ["30\n75.0%", "10\n25.0%", "0\n0.0%", "0\n0.0%"]


def test_confusion_of_many_classes_stays_a_page(tmp_path, drawn):
    assert is_png(plots.confusion(numpy.eye(50, dtype=int), [f"class {i}" for i in range(50)], tmp_path / "c.png"))
    assert not drawn[0].axes[0].texts and max(drawn[0].get_size_inches()) < 25


@pytest.mark.parametrize("heads", [None, 1, 5])  # one map without a head axis; five heads leave three panels empty
def test_attention_has_a_panel_a_head(tmp_path, drawn, heads):
    shape = (3, 4) if heads is None else (heads, 3, 4)
    weights = torch.rand(shape, dtype=torch.bfloat16, requires_grad=True)
    assert is_png(plots.attention(weights, ["é", "y", "$x$"], tmp_path / "a.png", keys=["a", "b", "c", "d"]))
    shown = [panel for panel in drawn[0].axes if panel.axison]
    assert len(shown) == (heads or 1)
    image = shown[-1].get_images()[0].get_array()
    numpy.testing.assert_array_equal(image, weights.detach().float().numpy().reshape(-1, 3, 4)[-1])


@pytest.mark.parametrize("tokens", [["tok"] * 30, ["x" * 100]], ids=["many", "long"])
def test_titles_and_labels_are_not_cut(tmp_path, tokens):
    assert is_png(plots.attention(torch.rand(len(tokens), len(tokens)), tokens, tmp_path / "a.png"))
    assert is_png(plots.confusion(numpy.eye(2, dtype=int), [tokens[0] * 20, "b"], tmp_path / "c.png"))


def test_a_character_without_a_glyph_becomes_its_code_point_and_is_told_once(monkeypatch, capsys):
    monkeypatch.setattr(plots, "_told", set())
    for _ in range(2):
        assert plots._drawable(["ab\ue000", "\ue004\ue001\ue003\ue002"])[0] == "abU+E000"
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"\(U\+E000\), .* \(U\+E002\) and 2 more; install .*fonts-noto-cjk", line)
    plots._drawable(["\ue005"])
    assert "(U+E005); install" in capsys.readouterr().err


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda folder: plots.confusion(numpy.zeros((2, 2)), ["a"], folder / "x.png"), r"must be \(1, 1\)"),
        (lambda folder: plots.attention(torch.zeros(2, 3, 3), "ab", folder / "x.png"), r"must be \(H, 2, 2\)"),
        (lambda folder: plots.learning_curves(__file__, folder / "x.png"), "no record"),
    ],
)
def test_wrong_input_is_refused(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path)
    assert not list(tmp_path.iterdir())
