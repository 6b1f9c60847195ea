"""Folders of models: each kind saved, loaded in another process and used; damage named; templates of strangers held."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors", reason="the train extra is not installed")
pytest.importorskip("tokenizers", reason="the train extra is not installed")

import tileformer
from tileformer.decoder import Classifier, DecoderLM, DecoderLMConfig, Seq2Seq, Seq2SeqConfig, generate
from tileformer.decoder.adapters import add_bottlenecks
from tileformer.decoder.chat import framed
from tileformer.decoder.generation import Options
from tileformer.decoder.pretrained import Writing, load, load_writing, save_pretrained
from tileformer.decoder.tokenizer import Tokenizer

SRC = Path(tileformer.__file__).parents[1]
TEXTS = ["good tea", "bad tea", "good day to all of you"]


def tokenizer():
    return Tokenizer.train(TEXTS, minimum=1)


def small(kind):
    torch.manual_seed(1)
    size = tokenizer().size
    sizes = dict(d_model=16, nhead=2, dim_feedforward=32, max_length=24)
    if kind == "Seq2Seq":
        return Seq2Seq(Seq2SeqConfig(size, size, num_encoder_layers=1, num_decoder_layers=2, **sizes))
    model = DecoderLM(DecoderLMConfig(size, num_layers=2, **sizes, share_layers=kind == "shared"))
    if kind == "adapters":
        add_bottlenecks(model, 4)
        torch.nn.init.normal_(model.layers[0].linear2[1].up.weight)
    return Classifier(model, 3, pool="last", mix=True) if kind == "Classifier" else model


KINDS = ("Seq2Seq", "DecoderLM", "shared", "adapters", "Classifier")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    models = {}
    for kind in KINDS:
        models[kind] = small(kind).eval()
        classes = ("a", "b", "c") if kind == "Classifier" else ()
        save_pretrained(models[kind], root / kind, tokenizer=tokenizer(), classes=classes, card="# It", shard=4000)
    return root, models


def used(model, made):
    rows = torch.tensor([[1, *made.encode("good")]])
    if isinstance(model, Classifier):
        return model(rows).tolist()
    return generate(model, rows, 6).tolist()


def test_every_kind_is_used_in_another_process(folders):
    root, models = folders
    program = """if True:
        import sys; sys.path.insert(0, sys.argv[3])
        from test_decoder_pretrained import KINDS, used
        from tileformer.decoder.pretrained import load
        print({kind: used(*load(f"{sys.argv[1]}/{kind}")) for kind in KINDS})"""
    words = [sys.executable, "-c", program, str(root), "", str(Path(__file__).parent)]
    done = subprocess.run(words, capture_output=True, text=True, env={"PYTHONPATH": str(SRC), "PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr
    assert eval(done.stdout) == {kind: used(model, tokenizer()) for kind, model in models.items()}
    assert len([*(root / "Seq2Seq").glob("model-*.safetensors")]) > 2
    assert (root / "Seq2Seq/README.md").read_text().endswith("# It\n")


def test_tied_weights_stay_tied_and_other_dtypes_are_asked_for(folders):
    root, models = folders
    model, made = load(root / "DecoderLM", dtype=torch.bfloat16)
    assert model.head is model.embedding.weight and model.head.dtype == torch.bfloat16 and not model.training
    assert torch.equal(model.head, models["DecoderLM"].head.bfloat16()) and made.target is made
    assert load(root / "shared")[0].layers.__len__() == 1


def test_a_folder_is_read_by_transformers_tokenizers(folders):
    transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")
    root, _ = folders
    theirs = transformers.AutoTokenizer.from_pretrained(root / "DecoderLM")
    assert theirs("good tea", add_special_tokens=False).input_ids == tokenizer().encode("good tea")
    assert (theirs.pad_token, theirs.eos_token) == ("<pad>", "<eos>")


def test_how_a_model_writes_is_kept(tmp_path):
    options = Options(temperature=0.7, top_p=0.9, repetition_penalty=1.1)
    writing = Writing(options, 12, True, "{input}: {text}", "a.*", "an a")
    save_pretrained(small("DecoderLM"), tmp_path, tokenizer=tokenizer(), writing=writing)
    assert load_writing(tmp_path) == writing
    said = json.loads((tmp_path / "generation_config.json").read_text())
    assert said["do_sample"] and said["temperature"] == 0.7 and said["eos_token_id"] == 2
    (tmp_path / "generation_config.json").write_text(json.dumps(said | {"do_sample": False, "top_k": 0}))
    assert load_writing(tmp_path).options == Options(repetition_penalty=1.1)
    (tmp_path / "generation_config.json").write_text(json.dumps(said | {"top_p": 7}))
    with pytest.raises(ValueError, match=r"generation_config.json: top_p must be in \(0, 1\], got 7"):
        load_writing(tmp_path)


def test_models_and_vocabularies_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(TypeError, match="a folder holds one of .*DecoderLM, Seq2Seq, .* got a Linear"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path / "x")
    large = Tokenizer.of_symbols([chr(0x4E00 + i) for i in range(90)], spaced=False)
    with pytest.raises(ValueError, match="a tokenizer of 93 ids does not fit a model of"):
        save_pretrained(small("DecoderLM"), tmp_path / "x", tokenizer=large)
    with pytest.raises(ValueError, match="a Classifier of 3 classes got 1 names"):
        save_pretrained(small("Classifier"), tmp_path / "x", classes=["a"])
    assert not (tmp_path / "x").exists()


def damaged(root, folder, change):
    for file in (root / "Seq2Seq").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change(folder)
    with pytest.raises(ValueError) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(folder))
    return str(caught.value).removeprefix(str(folder))


def edit(name, **values):
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: (x / "config.json").unlink(), ": expected the folder of a model, with config.json; it has none"),
        (lambda x: (x / "config.json").write_text("{"), "damaged or truncated; expected JSON"),
        (lambda x: (x / "config.json").write_text("[]"), "expected an object with a model_type"),
        (edit("config.json", model_type="bert"), "model_type 'bert'"),
        (edit("config.json", architectures=["Bert"]), "DecoderLM, Seq2Seq, "),
        (edit("config.json", d_model="16"), "/config.json: "),
        (edit("config.json", d_model=17), "a width of 17 cannot be split into 2 heads"),
        (edit("config.json", num_decoder_layers=3), ": the weights lack transformer.decoder.layers.2"),
        (edit("config.json", num_decoder_layers=1), ": the weights hold 'transformer.decoder.layers.1"),
        (edit("config.json", src_vocab=50), "the configuration says (50, 16)"),
        (lambda x: next(x.glob("model-00002*")).unlink(), "missing, 1 of the"),
        (lambda x: next(x.glob("model-00002*")).write_bytes(b"x" * 9), "damaged, or not in the safetensors format"),
        (edit("model.safetensors.index.json", weight_map={"a": "../x"}), "'../x' leads out of the folder"),
        (edit("model.safetensors.index.json", weight_map=3), "expected a weight_map"),
        (lambda x: (x / "model.safetensors.index.json").unlink(), "missing; expected the model's weights"),
        (lambda x: (x / "tokenizer.json").write_text((x / "tokenizer.json").read_text()[:200]), "damaged or truncated"),
        (edit("tokenizer.json", model={"type": "BPE"}), "/tokenizer.json: damaged"),
    ],
)
def test_damage_is_one_line(folders, tmp_path, change, message):
    assert message in damaged(folders[0], tmp_path, change)


def talking(template):
    made = tokenizer()
    made.chat_template = template
    return framed(made)


def test_a_conversation_is_framed_by_the_template():
    template = (
        "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m.content | trim }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    frame = talking(template)
    assert frame([{"role": "user", "content": " hi "}]) == "<bos><user>hi<assistant>"
    assert talking("{{ ''.__class__ }}{{ messages._items }}")([]) == ""  # an attribute that may not be read is none
    made = tokenizer()
    assert made.encode_all(["<bos>go"], special=True)[0][0] == 1 not in made.encode("<bos>go")


@pytest.mark.parametrize(
    "template, message",
    [
        (None, "this model has no chat template"),
        ("{% for", "the chat template is no Jinja"),
        ("{{ messages.__class__.__mro__ }}", "the chat template fails: "),
        ("{{ messages.append(1) }}", "the chat template fails: "),
        ("{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}", "it does not end"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "the chat template fails: "),
        ("{{ 'a' * 10 ** 12 }}", "numbers that large"),
        ("{{ 'a' * 900000000 }}", "numbers that large"),
        ("{{ raise_exception('roles must alternate') }}", "the chat template fails: roles must alternate"),
    ],
)
def test_a_strangers_template_ends_in_one_line(template, message):
    with pytest.raises(ValueError, match=message):
        talking(template)([{"role": "user", "content": "x"}])
