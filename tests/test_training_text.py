"""Texts: what cleaning keeps, what a bad file is told, and a split in which no text stands on both sides."""

import hashlib
import random

import hypothesis
import pytest
from hypothesis import strategies

from tileformer import files
from tileformer.training.data import text
from tileformer.training.data.text import Labelled


@pytest.mark.parametrize(
    "raw, wanted",
    [
        ("好<br/>很<b>好</b>", "好 很好"),  # a break is a space, an inline tag stands inside a word
        ("a<!-- x\ny -->b<script type='t'>var c = 1 < 2;</script>d", "a b d"),
        ("1 < 2 and 3 > 2, <3, <穿PRADA的恶魔>, <PRADA的恶魔>", "1 < 2 and 3 > 2, <3, <穿PRADA的恶魔>, <PRADA的恶魔>"),
        ("A&amp;B &lt;b&gt; &#20320;&nbsp;&nbsp;好", "A&B <b> 你 好"),
        ("ＡＢＣ１２３，！　。ｶﾞ", "ABC123,! 。ガ"),
        ("a\u200bb\ufeffc\u202ed\u00ade", "abcde"),  # zero-width space, byte-order mark, direction, soft hyphen
        ("a\x00\x07b\t \r\n c\x85d\u2028e\x1b", "ab c d e"),
        ("x\ud800y", "xy"),
    ],
)
def test_cleaning(raw, wanted):
    assert text.clean(raw) == wanted


def test_each_part_of_cleaning_can_be_left_out():
    assert text.clean("<b>Ａ</b>", markup=False) == "<b>A</b>"
    assert text.clean("<b>Ａ</b>", width=False) == "Ａ"
    assert text.clean("<b>Ａ</b>", case=True) == "a"


@hypothesis.given(strategies.text())
def test_cleaned_text_is_one_line_that_any_file_can_hold(raw):
    cleaned = text.clean(raw, markup=False)
    assert cleaned == " ".join(cleaned.split()) and len(cleaned.splitlines()) <= 1
    assert cleaned.encode().decode() == cleaned
    assert text.clean(cleaned, markup=False) == cleaned


def test_copies_share_a_key_and_its_place_is_the_published_rule():
    assert text.key("Ｇｏｏｄ ，很-好！２") == text.key("good很好2") == "good很好2"
    assert text.key("किताब") != text.key("काताब"), "vowels that are marks are part of a word"
    digest = hashlib.sha256("good很好2".encode()).digest()
    assert text.hash_bucket("good很好2") == int.from_bytes(digest[:8], "big") % 100 == 26
    assert text.hash_bucket("good很好2", 1 << 64) == int.from_bytes(digest[:8], "big")


@pytest.fixture
def file(tmp_path):
    def write(content, name="reviews.tsv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_a_labelled_file_is_read(file):
    path = file("\ufeffpos\t很好\tand more \r\n\n  \nneg\t 差\npos\t\u2028ok")  # no other sign ends a line of these
    read = text.read_labelled(path)
    assert read == Labelled(("很好\tand more", "差", "\u2028ok"), (1, 0, 1), ("neg", "pos"))
    assert len(read) == 3 and read.pick([2, 0]).texts == ("\u2028ok", "很好\tand more")
    assert text.read_labelled(path, names=["pos", "neg", "other"]).labels == (0, 1, 0)
    assert len(text.read_labelled(file("a\t" + "x" * 20 + "\nb\ty"), longest=20)) == 2
    assert text.read_labelled(file("pos\tx\rneg\ty\r")).texts == ("x", "y")  # nothing but \r, as on a Mac of old
    assert text.read_labelled(file("a\t好\nb\t坏\n".encode("gb18030")), encoding="gb18030").texts == ("好", "坏")


SKIP = ": mend {} of {} lines, or leave them out with --skip-bad-lines (skip_bad_lines=True)"
CHINESE = "今天我们去看了那个房间，感觉很好。\n服务员的态度也不错，下次还会再来。\n"


@pytest.mark.parametrize(
    "content, encoding, advice",
    [
        (CHINESE.encode() + b"caf\xe9\n", "utf-8", "most of it is" + SKIP.format(1, 4)),  # not cp1252, which has 0xe9
        (CHINESE.encode() + b"\xba\xc3\n", "utf-8", "most of it is" + SKIP.format(1, 4)),
        (CHINESE.encode("gb18030") + b"\xff\n", "gb18030", "most of it is" + SKIP.format(1, 4)),
        (CHINESE.encode(), "gb18030", "it reads as utf-8: give that encoding"),
        (CHINESE.encode("gb18030"), "utf-8", "it reads as gb18030: give that encoding"),
        ("這個房間很好，服務員的態度也不錯。".encode("big5"), "utf-8", "it reads as big5: give that encoding"),
        ("l’été à la plage, crème brûlée\n".encode("cp1252"), "utf-8", "it reads as cp1252: give that encoding"),
        ("größere Straßen".encode("latin-1"), "utf-8", "it reads as cp1252: give that encoding"),
        ("сегодня хорошая погода".encode("cp1251"), "utf-8", "no usual encoding fits" + SKIP.format(1, 1)),
        ("今日は良い天気ですね。".encode("shift_jis"), "utf-8", "no usual encoding fits" + SKIP.format(1, 1)),
        ("a好".encode("utf-16-be") + b"\0\n", "utf-8", "it reads as utf-16-be: give that encoding"),
        ("a".encode("utf-32"), "utf-8", "it reads as utf-32: give that encoding"),
    ],
)  # fmt: skip
def test_an_encoding_is_suggested_only_where_the_text_would_read(content, encoding, advice):
    with pytest.raises(files.UnreadableError) as caught:
        files.decode(content, "x.txt", encoding)
    assert str(caught.value).endswith(f"text; {advice}") and str(caught.value).startswith("x.txt:")


def test_lines_of_files_as_people_have_them():
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):  # each with a mark
        for end in ("\n", "\r\n", "\r"):
            assert files.lines_of(end.join(["好", "", "b"]).encode(encoding), "x") == ["好", "", "b"]
    content = b"a\n\xff\nb\0\nc\n"
    with pytest.raises(files.UnreadableError, match="x:2: byte 0xff"):
        files.lines_of(content, "x")
    first, second, third, *others = files.lines_of(content + b"d", "x", skip_bad_lines=True)
    assert [first, *others] == ["a", "c", "d"]
    assert str(second) == "x:2: '\ufffd' is not utf-8 text" and str(third) == "x:3: 'b\\x00' is not utf-8 text"
    with pytest.raises(files.UnreadableError, match="reads as gb18030"):  # the file, not a line of it
        files.lines_of(CHINESE.encode("gb18030") + b"ok", "x", skip_bad_lines=True)


def test_bad_lines_of_a_labelled_file_can_be_left_out(file):
    path = file(b"a\tok\nb\tc\xff\n" + "\ufeffa\tx\nno tab\n\tno label\nb\t".encode() + CHINESE.split("\n")[0].encode())
    with pytest.raises(ValueError, match="2: byte 0xff at offset 8 .* most of it is: mend 1 of 6 lines"):
        text.read_labelled(path)
    with pytest.warns(UserWarning, match=r"tsv: 3 of 6 lines are left out, the first is 2: '.*' is not utf-8 text$"):
        read = text.read_labelled(path, skip_bad_lines=True)
    assert (read.labels, len(read.texts), read.names) == ((0, 0, 1), 3, ("a", "b"))


@pytest.mark.parametrize(
    "content, options, message",
    [
        (b"", {}, ": expected lines of label<TAB>text, the file holds none"),
        (b"\n  \n\r\n", {}, ": expected lines of label<TAB>text, the file holds none"),
        ("a\t好\n没有\nb\t坏\n也没有", {}, ":2: expected label<TAB>text, found no tab in '没有'; 1 more bad lines, the next is 4"),
        ("x" * 100, {}, f":1: expected label<TAB>text, found no tab in '{'x' * 39}...'"),
        ("a\tb\na\t \n", {}, ":2: expected label<TAB>text, found no text"),
        ("a\tb\n\tb\n", {}, ":2: expected label<TAB>text, found no label"),
        ("a\tb\nb\t" + "x" * 21, {"longest": 20}, ":2: a text of 21 characters, over 20; cut it"),
        ("a\tx\na\ty\n", {}, ": expected two labels or more, all 2 lines have 'a'"),
        ("a\tx\nc\ty\n", {"names": ["a", "b"]}, ":2: unknown label 'c'; there is: 'a, b'"),
        ("a\tx\na\ty\n", {"names": ["a", "b"]}, ": expected two labels or more, all 2 lines have 'a'"),
        ("\n".join(f"text {i}\t{i % 2}" for i in range(30)), {}, ": 30 labels in 30 lines; swap columns that are text<TAB>label"),
        ("a\tok\nb\t好\n".encode("gb18030"), {}, ":2: byte 0xba at offset 7 is not utf-8 text; it reads as gb18030: give that encoding"),
        ("a\tok\nb\tcaf\xe9 au\n".encode("cp1252"), {}, ":2: byte 0xe9 at offset 10 is not utf-8 text; it reads as cp1252: give that encoding"),
        ("a\tb\n".encode("utf-16-le"), {}, ":1: byte 0x00 at offset 1 is not utf-8 text; it reads as utf-16-le: give that encoding"),
        (b"a\tb\nb\tc\0d\n", {}, ":2: byte 0x00 at offset 7 is not utf-8 text; no usual encoding fits" + SKIP.format(1, 3)),
        (b"a\tb\xff\x80\n\x9d", {}, ":1: byte 0xff at offset 3 is not utf-8 text; no usual encoding fits" + SKIP.format(2, 2)),
        ("a\t好\n", {"encoding": "ascii"}, ":1: byte 0xe5 at offset 2 is not ascii text; it reads as utf-8: give that encoding"),
        ("a\t好\n", {"encoding": "utf8000"}, ": Python knows no encoding 'utf8000'; try utf-8 or gb18030"),
    ],
)  # fmt: skip
def test_a_bad_file_is_told_what_and_where(file, content, options, message):
    path = file(content)
    with pytest.raises(ValueError) as caught:
        text.read_labelled(path, **options)
    assert str(caught.value) == f"{path}{message}"


def labelled(*lines):
    """ "label text" each, labels a and b."""
    return Labelled(tuple(line[2:] for line in lines), tuple("ab".index(line[0]) for line in lines), ("a", "b"))


def test_duplicates_go_and_conflicts_with_all_their_lines():
    lines = "a good, very good", "b bad", "a ＧＯＯＤ very good!", "a 都行", "b 都行。", "b 都 行", "a !好", "b 坏的"
    kept, counts = text.deduplicate(labelled(*lines))
    assert kept == labelled("a good, very good", "b bad", "b 坏的")
    alike = labelled("a <b>很好</b>!", "a 很&#22909;")
    assert text.deduplicate(alike)[1]["kept"] == 1 and text.deduplicate(alike, clean=str)[1]["kept"] == 2
    assert counts == {"lines": 8, "short": 1, "conflicting": 3, "repeated": 1, "kept": 3}


WORDS = Labelled(
    tuple(f"review number {n}" for n in range(2000)), tuple(int(n % 3 == 0) for n in range(2000)), ("a", "b")
)


def test_the_split_follows_from_the_texts_alone():
    parts = text.split(WORDS)
    # The rule, written out: sha256 of the key, first 8 bytes, big-endian, % 100: under 10 test, under 15 valid.
    for name, part in parts.items():
        for line in part.texts:
            digest = hashlib.sha256(line.replace(" ", "").encode()).digest()
            at = int.from_bytes(digest[:8], "big") % 100
            assert name == ("test" if at < 10 else "valid" if at < 15 else "train")
    assert {name: len(part) for name, part in parts.items()} == {"train": 1668, "valid": 119, "test": 213}
    mixed = list(range(2000)) * 2
    random.Random(0).shuffle(mixed)
    again = text.split(WORDS.pick(mixed))
    assert {name: set(part.texts) for name, part in again.items()} == {name: set(p.texts) for name, p in parts.items()}


def test_a_split_without_two_labels_in_each_part_is_refused():
    with pytest.raises(ValueError, match=r"the (train|valid|test) part has \d+ texts of [01] label"):
        text.split(WORDS.pick(range(8)))
    everything = text.split(WORDS)
    places = {line: number for number, line in enumerate(WORDS.texts)}
    train = [places[line] for line in everything["train"].texts]
    rare = places[everything["test"].texts[0]]
    labels = [2 if n == rare else label for n, label in enumerate(WORDS.labels)]
    with pytest.raises(ValueError, match="label 'rare' stands in test but never in train"):
        text.split(Labelled(WORDS.texts, tuple(labels), ("a", "b", "rare")))
    one = [0 if n in set(train) else label for n, label in enumerate(WORDS.labels)]
    with pytest.raises(ValueError, match="the train part has 1,668 texts of 1 label, two are needed"):
        text.split(Labelled(WORDS.texts, tuple(one), ("a", "b")))
    for test, valid in ((0, 5), (10, 0), (60, 40)):
        with pytest.raises(ValueError, match=f"got {test} % and {valid} %"):
            text.split(WORDS, test, valid)


def test_a_subset_has_the_proportions_of_all_and_grows():
    small, large = text.subset(WORDS, 100, 0), text.subset(WORDS, 1000, 0)
    assert (len(small), sum(small.labels)) == (100, 33) and (len(large), sum(large.labels)) == (1000, 333)
    assert set(small.texts) < set(large.texts)
    assert sorted(small.texts, key=WORDS.texts.index) == list(small.texts)
    backwards = text.subset(WORDS.pick(range(1999, -1, -1)), 100, 0)
    assert set(backwards.texts) == set(small.texts) != set(text.subset(WORDS, 100, 1).texts)
    assert text.subset(WORDS, 2000, 5) == WORDS


def test_a_subset_has_every_label():
    rare = Labelled(
        WORDS.texts, tuple(2 if n == 700 else label for n, label in enumerate(WORDS.labels)), ("a", "b", "c")
    )
    assert set(text.subset(rare, 3, 0).labels) == {0, 1, 2}
    for n in (2, 2001):
        with pytest.raises(ValueError, match=f"must have 3 to 2,000 texts .* got {n:,}"):
            text.subset(rare, n, 0)
