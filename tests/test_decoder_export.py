"""to_ctranslate2: CTranslate2 gives the tokens and scores of `generate`; what it has no counterpart of is refused before
anything is written."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tileformer.decoder import (
    DecoderLM,
    DecoderLMConfig,
    Seq2Seq,
    Seq2SeqConfig,
    convert,
    generate,
    revert,
    to_ctranslate2,
)

ctranslate2 = pytest.importorskip("ctranslate2", reason='the extra "export"')
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor")  # torch, of an encoder of its own

PAD, BOS, EOS = 0, 1, 2
SOURCES, STEPS, THREADS = 100, 16, dict(inter_threads=1, intra_threads=1)
FORMS = [dict(norm_first=first, activation=name) for first in (True, False) for name in ("relu", "gelu")]
forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))


def pair(**form):
    return drawn(Seq2Seq(Seq2SeqConfig(40, 20, 32, 4, 2, 3, 64, max_length=24, **form)), 1)


def lm(**form):
    return drawn(DecoderLM(DecoderLMConfig(20, 32, 4, 3, 64, max_length=40, **form)), 0)


def drawn(model, seed):
    """Weights that tell sequences apart and let some end, and none that is 0 or 1, as a new model's biases and norms
    are."""
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=(1 if "embedding" in name or "position" in name else 2) * p.shape[-1] ** -0.5)
        else:
            nn.init.normal_(p, mean=1.0 if "norm" in name and "weight" in name else 0.0, std=0.1)
    words = model.tgt_embedding if isinstance(model, Seq2Seq) else model.embedding
    words.weight.data[model.eos_id] *= 2
    return model.eval().requires_grad_(False)


def rows(vocabulary, longest):
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, vocabulary, (SOURCES, longest), generator=draw)
    return tokens.masked_fill(torch.arange(longest) >= torch.randint(1, longest + 1, (SOURCES, 1), generator=draw), 0)


def texts(rows):
    return [[str(token) for token in row if token] for row in rows.tolist()]


def near_tie(logits, row, other):
    """Whether the two best tokens behind what two rows begin with are one for float32."""
    same = next(i for i, (a, b) in enumerate(zip(row, other, strict=False)) if a != b)
    best = logits([[int(token) for token in row[:same]]])[0].topk(2).values
    return float(best[0] - best[1]) < 1e-5


def best_of(logits, beams):
    """The score of the best row by beams that keep no greedy row: at each step, of all rows the best, ended or not."""
    kept = [(0.0, [])]
    while live := [(score, row) for score, row in kept if row[-1:] != [EOS] and len(row) < STEPS]:
        following = [pair for pair in kept if pair not in live]
        for (score, row), logp in zip(live, logits([row for _, row in live]).log_softmax(-1).tolist(), strict=True):
            following += [(score + x, [*row, token]) for token, x in enumerate(logp) if token != PAD]
        kept = sorted(following, reverse=True)[:beams]
    return kept[0][0]


def check(model, given, logits, greedy, beams):
    """What CTranslate2 gave greedily, and its best of 5 beams with their scores; `logits(i)` reads rows behind row i."""
    expected = texts(generate(model, given, STEPS))
    others = [i for i in range(SOURCES) if greedy[i] != expected[i]]
    assert len(others) <= 2 and all(near_tie(logits(i), expected[i], greedy[i]) for i in others)
    ended, distinct = sum(row[-1] == str(EOS) for row in expected), {tuple(row) for row in expected}
    assert ended >= 10 and len(distinct) >= 15, "all rows are alike: nothing is shown"
    tokens, scores = generate(model, given, STEPS, num_beams=5, n_best=1, length_penalty=0.0)
    best = texts(tokens[:, 0])
    assert sum(a != b for a, b in zip(best, expected, strict=True)) >= 10
    same = [i for i in range(SOURCES) if best[i] == beams[i][0]]
    assert [beams[i][1] for i in same] == pytest.approx(scores[same, 0].tolist(), abs=1e-4)
    for i in {*range(SOURCES)} - {*same}:  # where a greedy row was kept that beams would lose
        assert beams[i][1] == pytest.approx(best_of(logits(i), 5), abs=1e-4)
    assert len(same) >= 75


def without_padding(logits):
    return logits.index_fill(-1, torch.tensor(PAD), float("-inf"))


@forms
def test_a_translator_gives_the_tokens_of_a_seq2seq(form, tmp_path):
    model, sources = pair(**form), rows(40, 9)
    to_ctranslate2(model, tmp_path / "new" / "model")
    translator = ctranslate2.Translator(str(tmp_path / "new" / "model"), **THREADS)
    options = dict(max_decoding_length=STEPS, min_decoding_length=0, disable_unk=True, return_end_token=True)
    options |= dict(return_scores=True, length_penalty=0)
    greedy = [x.hypotheses[0] for x in translator.translate_batch(texts(sources), beam_size=1, **options)]
    beams = [(x.hypotheses[0], x.scores[0]) for x in translator.translate_batch(texts(sources), beam_size=5, **options)]

    def logits(i):
        read = lambda new: torch.tensor([[BOS, *row] for row in new])  # noqa: E731
        return lambda new: without_padding(model(sources[i].expand(len(new), -1), read(new))[:, -1])

    check(model, sources, logits, greedy, beams)


@pytest.mark.parametrize("form", [*FORMS, dict(share_layers=True)], ids=lambda form: "-".join(map(str, form.values())))
def test_a_generator_gives_the_tokens_of_a_decoder_lm(form, tmp_path):
    model, prompts = lm(**form), F.pad(rows(20, 5), (1, 0), value=BOS)
    to_ctranslate2(model, tmp_path)
    generator = ctranslate2.Generator(str(tmp_path), **THREADS)
    options = dict(max_length=STEPS, min_length=0, disable_unk=True, return_end_token=True, return_scores=True)
    options |= dict(include_prompt_in_result=False, length_penalty=0)
    greedy = [x.sequences[0] for x in generator.generate_batch(texts(prompts), beam_size=1, **options)]
    # Behind the shorter prompts of a batch its beams do not end at once.
    found = generator.generate_batch(texts(prompts), beam_size=5, max_batch_size=1, **options)
    beams = [(x.sequences[0], x.scores[0]) for x in found]

    def logits(i):
        prompt = [token for token in prompts[i].tolist() if token != PAD]
        return lambda new: without_padding(model(torch.tensor([[*prompt, *row] for row in new]))[:, -1])

    check(model, prompts, logits, greedy, beams)


def written(model, folder, **options):
    to_ctranslate2(model, folder, **options)
    return (folder / "model.bin").read_bytes(), json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("build", [pair, lm])
def test_layers_of_torch_and_their_twins_are_written_as_our_own(build, tmp_path):
    model = build()
    expected = written(model, tmp_path / "ours")
    assert revert(model).swapped and written(model, tmp_path / "torchs") == expected
    assert convert(model).swapped and written(model, tmp_path / "twins") == expected


def test_a_users_transformer_without_biases_in_another_precision(tmp_path):
    model = pair()
    shape = dict(norm_first=True, activation="relu", batch_first=True, bias=False, layer_norm_eps=1e-2)
    model.transformer = nn.Transformer(32, 4, 2, 3, 64, **shape)
    model = drawn(model, 1).double()
    sources = rows(40, 9)
    to_ctranslate2(model, tmp_path)
    options = dict(max_decoding_length=STEPS, min_decoding_length=0, disable_unk=True, return_end_token=True)
    found = ctranslate2.Translator(str(tmp_path), **THREADS).translate_batch(texts(sources), beam_size=1, **options)
    expected = texts(generate(model, sources, STEPS, use_cache=False))
    assert sum(x.hypotheses[0] == row for x, row in zip(found, expected, strict=True)) >= SOURCES - 2
    assert len({tuple(row) for row in expected}) >= 15


def test_texts_stand_for_ids(tmp_path):
    model = pair()
    names = dict(source_tokens=[f"s{i}" for i in range(40)], target_tokens=[f"t{i}" for i in range(20)])
    names["source_tokens"][PAD] = names["target_tokens"][PAD] = "nothing"
    config = written(model, tmp_path, **names)[1]
    wanted = dict(unk_token="nothing", bos_token="t1", eos_token="t2", decoder_start_token="t1")
    assert {name: config[name] for name in wanted} == wanted
    assert not config["add_source_bos"] and not config["add_source_eos"]
    options = dict(beam_size=1, max_decoding_length=4, min_decoding_length=0, disable_unk=True, return_end_token=True)
    (found,) = ctranslate2.Translator(str(tmp_path), **THREADS).translate_batch([["s5", "s30", "s7"]], **options)
    assert found.hypotheses[0] == [f"t{i}" for i in generate(model, torch.tensor([[5, 30, 7]]), 4)[0].tolist()]


class Adapter(nn.Linear):
    def forward(self, x):
        return super().forward(x) + x


def hooked(model):
    model.transformer.decoder.layers[1].norm2.register_forward_hook(lambda *_: None)


def adapted(model):
    model.transformer.encoder.layers[0].self_attn.out_proj = Adapter(32, 32)


def replaced(model):
    model.transformer.decoder.layers[0].linear1.forward = lambda x: x


def uneven(model):
    model.transformer.decoder.layers[2].activation = F.relu


def strange(model):
    for layer in (*model.transformer.encoder.layers, *model.transformer.decoder.layers):
        layer.activation = F.silu


def other_eps(model):
    model.transformer.decoder.norm.eps = 0.1


def endless(model):
    model.transformer = nn.Transformer(32, 4, 2, 3, 64, batch_first=True, norm_first=True)
    model.transformer.decoder.norm = None


@pytest.mark.parametrize(
    "change, said",
    [
        (hooked, r"transformer.decoder.layers.1.norm2 has a hook"),
        (adapted, r"transformer.encoder.layers.0.self_attn.out_proj is a .*Adapter, which CTranslate2"),
        (replaced, r"transformer.decoder.layers.0.linear1 has a hook, or a forward of its own"),
        (uneven, r"one form for all layers"),
        (strange, r"activation .*silu.* has no counterpart"),
        (other_eps, r"one eps for all norms"),
        (endless, r"needs a final norm"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_has_no_counterpart_is_refused_before_anything_is_written(change, said, tmp_path):
    model = pair()
    change(model)
    with pytest.raises(ValueError, match=said):
        to_ctranslate2(model, tmp_path / "model")
    assert not any(tmp_path.iterdir())


def test_bad_input_is_refused_before_anything_is_written(tmp_path):
    class Own(DecoderLM):
        pass

    for model in (nn.Transformer(32, 4), Own(lm().config)):
        with pytest.raises(ValueError, match="Seq2Seq or a DecoderLM is written, got"):
            to_ctranslate2(model, tmp_path / "model")
    twice = [str(i // 2) for i in range(20)]
    for options, said in (
        (dict(target_tokens=["a"]), "target_tokens has 1 texts.*vocabulary has 20"),
        (dict(target_tokens=twice), "target_tokens has 20 texts, 10 different"),
        (dict(source_tokens=twice), "source_tokens has 20 texts.*vocabulary has 40"),
        (dict(source_tokens=[f"s{i}" for i in range(40)]), "one text at pad_id 0"),
    ):
        with pytest.raises(ValueError, match=said):
            to_ctranslate2(pair(), tmp_path / "model", **options)
    with pytest.raises(ValueError, match="a DecoderLM has no source"):
        to_ctranslate2(lm(), tmp_path / "model", source_tokens=twice)
    assert not any(tmp_path.iterdir())
    (tmp_path / "kept").write_text("mine")
    for folder in (tmp_path, tmp_path / "kept"):
        with pytest.raises(ValueError, match="is there, and no empty folder"):
            to_ctranslate2(pair(), folder)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
