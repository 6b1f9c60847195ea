"""A recipe is a value: anybody's own runs, resumes and is used by the same program; each has options of its own."""

import pytest
import torch

from tileformer.__main__ import main
from tileformer.decoder import Seq2Seq, Seq2SeqConfig, generate
from tileformer.training import Batches, Settings, checkpoint, sequence_loss
from tileformer.training.recipes import RECIPES, Data, Recipe, run
from tileformer.training.recipes.recipe import Scale, load

PAIRS = [([3 + i % 7, 3 + i % 5], [3 + i % 5, 3 + i % 7]) for i in range(64)]
REVERSE = Recipe(
    name="reverse",
    quick=Scale(Settings(2000, precision="fp32"), 16),
    data=lambda args: Data(
        Batches(PAIRS, args.scale.batch, seed=args.seed), Batches(PAIRS, 64), test=PAIRS[: args.shown]
    ),
    config=lambda args, data: Seq2SeqConfig(10, 10, 16, 2, 1, 1, 32, dropout=0.0),
    config_type=Seq2SeqConfig,
    model=Seq2Seq,
    loss=sequence_loss,
    arguments=lambda parser: parser.add_argument("--shown", type=int, default=1),
    evaluate=lambda model, data, report, args: (f"{source} becomes {target}" for source, target in data.test),
    show=lambda model, vocabulary, rows: [str(generate(model, torch.tensor([row]))[0].tolist()) for row in rows],
)


def test_anybodys_pairs_are_a_recipe(tmp_path, capsys):
    options = [f"--output={tmp_path}", "--device=cpu", "--precision=fp32", "--shown=2"]
    whole = run(REVERSE, [*options, "--tokens=1000"])
    out = capsys.readouterr().out
    assert "budget 1,000 tokens, 16 a batch" in out and out.count(" becomes ") == 2
    assert whole.checkpoint == checkpoint.latest(tmp_path) and f"checkpoint {whole.checkpoint}\n" in out
    with pytest.raises(ValueError, match="a run is already here"):
        run(REVERSE, options)
    with pytest.raises(ValueError, match="settings tokens=1000; asked to resume with 2000"):
        run(REVERSE, [*options, "--resume"])
    model, vocabulary = load(REVERSE, checkpoint.latest(tmp_path), torch.device("cpu"))
    assert REVERSE.show(model, vocabulary, [[4, 5]])[0].startswith("[") and not model.training
    with pytest.raises(ValueError, match="expected a model of the g2p recipe, found 'reverse'"):
        load(RECIPES["g2p"], checkpoint.latest(tmp_path), torch.device("cpu"))
    with pytest.raises(SystemExit):
        run(REVERSE, ["--full"])  # it has one size


def test_options_stand_where_they_belong(capsys):
    texts = {}
    for words in ("train", "train g2p", "train poems", "train reviews", "finetune", "generate"):
        with pytest.raises(SystemExit):
            main([*words.split(), "--help"])
        texts[words] = capsys.readouterr().out
    assert [words for words, text in texts.items() if "--split-by" in text] == ["train g2p"]
    assert [words for words, text in texts.items() if "--data" in text] == ["train poems", "finetune"]
    assert [words for words, text in texts.items() if "--tokens" in text] == [
        "train g2p",
        "train poems",
        "train reviews",
        "finetune",
    ]
    assert "PER 9.6 %," in texts["train g2p"] and all(name in texts["train"] for name in RECIPES)


@pytest.mark.parametrize(
    "words, message",
    [
        ("train poems --split-by stem", "unrecognized arguments: --split-by stem"),
        ("train g2p --data x", "unrecognized arguments: --data x"),
        ("train soup", "argument RECIPE: invalid choice: 'soup' (choose from"),
        ("train", "no recipe given; there is: pairs, text, g2p, poems, reviews"),
    ],
)
def test_an_option_of_another_recipe_is_one_line(words, message, capsys):
    try:
        status = main(words.split())
    except SystemExit as stopped:
        status = stopped.code
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith(f"tileformer: error: {message}")
