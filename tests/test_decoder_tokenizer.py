"""Tokenizers: the four special ids, one file, text back as it was, and nothing of a text taken for a special id."""

import json

import pytest

pytest.importorskip("tokenizers", reason="the finetune extra is not installed")

from tileformer.decoder import tokenizer as module
from tileformer.decoder.tokenizer import FORMAT, KINDS, Tokenizer

TEXTS = ["今天天气很好，我们去公园。 very good <eos> 12", "今天 我们 very ok", "天气好　good\n"] * 2


def train(kind, **options):
    if kind == "words":
        pytest.importorskip("rjieba", reason="the data extra is not installed")
    return Tokenizer.train(TEXTS, kind, **{"minimum": 1, "vocabulary": 300} | options)


@pytest.mark.parametrize("kind", KINDS)
def test_known_text_comes_back_as_it_was(kind):
    tokenizer = train(kind)
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_all(TEXTS)] == TEXTS
    assert tokenizer.encode_all(TEXTS[:2]) == [tokenizer.encode(text) for text in TEXTS[:2]]
    assert tokenizer.encode("") == [] and tokenizer.encode_all([]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_special_ids_come_first_and_from_no_text(kind):
    tokenizer = train(kind)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2, 3)
    ids = [number for text in ("<pad><bos><eos><unk>", *TEXTS) for number in tokenizer.encode(text)]
    assert set(ids) <= set(range(3, tokenizer.size))
    assert tokenizer.encode("龘") == [3] and tokenizer.decode([1, *tokenizer.encode("很龘"), 2, 0]).endswith("<unk>")


@pytest.mark.parametrize("kind", KINDS)
def test_one_file_holds_all_of_it(kind, tmp_path):
    tokenizer = train(kind)
    tokenizer.save(tmp_path / "tokenizer.json")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (loaded.kind, loaded.size, loaded.fingerprint) == (kind, tokenizer.size, tokenizer.fingerprint)
    texts = [*TEXTS, "<eos> 新"]
    assert loaded.encode_all(texts) == tokenizer.encode_all(texts)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_texts_give_the_same_ids(kind):
    assert train(kind).fingerprint == train(kind).fingerprint != train(kind, vocabulary=20).fingerprint
    one, other = (Tokenizer.train([word], kind, minimum=1) for word in ("甲乙", "丙丁"))
    assert one.size == other.size and one.fingerprint != other.fingerprint


def test_the_kinds_are_what_they_say():
    characters, bpe, words = (train(kind) for kind in KINDS)
    assert [characters.decode([i]) for i in characters.encode("今天天气")] == ["今", "天", "天", "气"]
    assert len(Tokenizer.train(["a\n\nb"], minimum=1).encode("a\n\nb")) == 4
    assert [words.decode([i]) for i in words.encode("今天天气很好")] == ["今天天气", "很", "好"]
    pieces = [bpe.decode([i]) for i in bpe.encode("今天我们,12")]
    assert "我们" in pieces and pieces[-2:] == ["1", "2"]  # digits and punctuation stand alone


def test_limits():
    assert train("characters", vocabulary=10).size == train("words", vocabulary=10).size == 10
    assert train("characters", minimum=3).encode("ｘ公天")[0] == 3
    small = train("bpe", vocabulary=24)
    assert small.size == 24 and any(len(small.decode([i])) > 1 for i in range(4, 24))  # not characters alone
    assert train("characters").encode(TEXTS[0], max_length=3) == train("characters").encode(TEXTS[0])[:3]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "letters"}, "kind must be one of characters, bpe, words, got 'letters'"),
        ({"vocabulary": 4}, "vocabulary must be above 4 .* got vocabulary 4 and minimum 2"),
        ({"minimum": 0}, "minimum at least 1, got vocabulary 8000 and minimum 0"),
        ({"minimum": 99}, "the texts hold nothing 99 times"),
    ],
)
def test_what_cannot_be_trained_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.train(TEXTS, **options)
    with pytest.raises(ValueError, match="the texts hold nothing 2 times; give more texts"):
        Tokenizer.train([])


def test_ids_of_another_vocabulary_are_refused():
    tokenizer = train("characters")
    for wrong in (tokenizer.size, -1):
        with pytest.raises(ValueError, match=f"are 0 to {tokenizer.size - 1}, got {wrong}"):
            tokenizer.decode([4, wrong])


@pytest.mark.parametrize(
    "content, message",
    [
        ("", r"damaged or truncated; expected JSON"),
        ("[]", r"expected a tokenizer.json of the tokenizers library, found \[\]"),
        (
            '{"format": "tileformer tokenizer 1", "kind": "letters"}',
            r"expected a kind of characters, bpe, words, found",
        ),
        (
            '{"format": "tileformer tokenizer 2", "kind": "bpe"}',
            r"expected a tokenizer.json .* found 'tileformer tokenizer 2'",
        ),
        ('{"format": "tileformer tokenizer 1", "kind": "bpe"}', r"damaged; .*'tokenizer'"),
        (
            '{"format": "tileformer tokenizer 1", "kind": "bpe", "tokenizer": {}}',
            r"damaged; the tokenizers library says",
        ),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "where, value, message",
    [
        (("model", "vocab", "天"), 5000, r"expected each id from 0 to \d+ once"),
        (("model", "vocab", "天"), 4, r"expected each id from 0 to \d+ once"),
        (("model", "vocab", "天"), "4", "an id is no whole number"),
        (("model", "vocab", "天"), 4.0, "an id is no whole number"),
        (("added_tokens", 0, "id"), 2, "expected <pad>, <bos>, <eos>, <unk> as the ids 0 to 3"),
        (("added_tokens",), [], "expected <pad>, <bos>, <eos>, <unk> as the ids 0 to 3"),
        (("model", "unk_token"), "nobody", "its rules are not those of a tokenizer of"),
        (("model", "type"), "nobody", "the tokenizers library says"),
        (
            ("pre_tokenizer",),
            {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
            "says",
        ),
        (
            ("truncation",),
            {"max_length": 1, "stride": 0, "strategy": "LongestFirst", "direction": "Right"},
            "its rules",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["characters", "bpe"])
def test_wrong_ids_and_rules_are_named(kind, where, value, message, tmp_path):
    train(kind).save(path := tmp_path / "tokenizer.json")
    content = inner = json.loads(path.read_text("utf-8"))
    for name in where[:-1]:
        inner = inner[name]
    inner[where[-1]] = value
    path.write_text(json.dumps({"format": FORMAT, "kind": kind, "tokenizer": content}), "utf-8")  # as once written
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.load(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 400 + len(str(path))


def test_a_panic_of_the_library_is_an_error(tmp_path, monkeypatch):
    """It is no Exception, so that `except Exception` lets it pass."""

    class PanicException(BaseException):
        pass

    def panics(*_):
        raise PanicException("called `Result::unwrap()` on an `Err` value")

    train("bpe").save(path := tmp_path / "tokenizer.json")
    monkeypatch.setattr(module, "_rules", panics)
    with pytest.raises(ValueError, match="damaged; the tokenizers library says: called `Result"):
        Tokenizer.load(path)


def test_a_missing_library_is_named(monkeypatch, tmp_path):
    train("characters").save(tmp_path / "tokenizer.json")
    plain = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    changed = {"format": FORMAT, "kind": "words", "tokenizer": plain | {"pre_tokenizer": None}}
    (tmp_path / "words.json").write_text(json.dumps(changed))
    monkeypatch.setitem(__import__("sys").modules, "rjieba", None)
    with pytest.raises(ValueError, match=r'rjieba is not installed: pip install "tileformer\[data\]"'):
        Tokenizer.load(tmp_path / "words.json")
