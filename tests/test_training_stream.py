"""Streams from disk: every line once an epoch, resumed at the exact one, never more than a group of text in memory."""

import pytest

pytest.importorskip("tokenizers", reason="the finetune extra is not installed")

from tileformer.decoder.tokenizer import Tokenizer
from tileformer.training.data.batches import PackedBatches
from tileformer.training.data.stream import GROUP, StreamedBatches, StreamedRows

# 120 distinct lines of 1 to 17 characters in two files, a blank one here and there, the last without its end.
LINES = [chr(0x4E00 + number) + "好" * (number % 17) for number in range(120)]
BUFFER = 60 * GROUP  # bytes: blocks of about two lines, several groups a file


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(LINES, minimum=1)


@pytest.fixture
def paths(tmp_path):
    parts = {"a.txt": "\n".join([*LINES[:50], "", "  \t", *LINES[50:70]]) + "\r\n\n", "b.txt": "\n".join(LINES[70:])}
    for name, text in parts.items():
        (tmp_path / name).write_bytes(text.encode())
    return [tmp_path / name for name in parts]


def take(items, count, value):
    """The first `count` items, over the ends of epochs."""
    got = []
    while len(got) < count:
        for item in items:
            got.append(value(item))
            if len(got) == count:
                break
    return got


def flat(batch):
    return batch.source.tolist(), batch.labels.tolist(), batch.cu_seqlens.tolist()


@pytest.mark.parametrize("seed", [None, 3])
def test_every_line_comes_once_an_epoch(paths, tokenizer, seed):
    rows = StreamedRows(paths, tokenizer, seed=seed, buffer=BUFFER)
    assert len(rows) == 120
    epochs = [[tokenizer.decode(row) for row in rows] for _ in range(2)]
    assert all(sorted(epoch) == sorted(LINES) for epoch in epochs)
    assert (epochs[0] == LINES) is (seed is None)
    assert (epochs[0] == epochs[1]) is (seed is None)


def test_the_order_follows_from_the_seed(paths, tokenizer):
    first, again, other = (list(StreamedRows(paths, tokenizer, seed=seed, buffer=BUFFER)) for seed in (1, 1, 2))
    assert first == again != other
    # Neighbours come from all over the corpus, not from one block.
    places = [LINES.index(tokenizer.decode(row)) for row in first]
    assert sum(abs(a - b) for a, b in zip(places, places[1:], strict=False)) / 119 > 20  # a random order has 40


def test_small_files_have_another_order_each_epoch_too(paths, tokenizer):
    rows = StreamedRows(paths[:1], tokenizer, seed=1)  # one block: only its lines can be shuffled
    assert len(rows.blocks) == 1 and list(rows) != list(rows)


def test_every_epoch_and_every_group_has_an_order_of_its_own(tmp_path, tokenizer):
    lines = [f"{LINES[0]}{number:02}" for number in range(4 * GROUP)]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    numbers = Tokenizer.train(lines, minimum=1)
    rows = StreamedRows([tmp_path / "lines.txt"], numbers, seed=0, buffer=GROUP)  # a block a line
    orders = []
    for epoch in range(2):
        plan = rows._plan(epoch)
        for end, group in zip(plan.ends, plan.groups, strict=True):
            assert plan[end - 1] in plan.held_rows
            read = [row for block in group for row in rows.read(block)]
            orders.append([read.index(row) for row in plan.held_rows])
        orders.append([block.line for group in plan.groups for block in group])
    assert len({tuple(order) for order in orders}) == len(orders) == 2 * 5


def test_blocks_know_where_they_stand(paths, tokenizer):
    for block in StreamedRows(paths, tokenizer, buffer=BUFFER).blocks:
        content = block.path.read_bytes()
        lines = content[block.start :][: block.size].decode().splitlines()
        assert block.line == 1 + content[: block.start].count(b"\n")
        assert block.count == sum(bool(line.strip()) for line in lines)


def test_one_group_is_held_at_a_time(paths, tokenizer, monkeypatch):
    rows, held = StreamedRows(paths, tokenizer, seed=0, buffer=BUFFER), []
    read = StreamedRows.read
    monkeypatch.setattr(StreamedRows, "read", lambda self, block: held.append(block) or read(self, block))
    iterator = iter(rows)
    next(iterator)
    assert sum(block.size for block in held) <= 2 * BUFFER and len(held) <= GROUP < len(rows.blocks)
    list(iterator)
    assert held != rows.blocks and sorted(held, key=str) == sorted(rows.blocks, key=str)  # each read once


@pytest.mark.parametrize("stop", [0, 1, 37, 119, 120, 150])
def test_rows_resume_at_the_exact_line(paths, tokenizer, stop):
    whole = take(StreamedRows(paths, tokenizer, seed=3, buffer=BUFFER), 300, list)
    stopped, resumed = (StreamedRows(paths, tokenizer, seed=3, buffer=BUFFER) for _ in range(2))
    head = take(stopped, stop, list)
    resumed.load_state_dict(stopped.state_dict())
    assert head + take(resumed, 300 - stop, list) == whole


@pytest.mark.parametrize("stop", range(0, 60, 7))
def test_batches_resume_at_the_exact_place(paths, tokenizer, stop):
    def batches():
        # 8 ids a piece and 21 places a batch: lines of 17 are cut, and go on in the next batch.
        return StreamedBatches(StreamedRows(paths, tokenizer, seed=3, buffer=BUFFER), 21, longest=8)

    whole = take(batches(), 150, flat)
    stopped, resumed = batches(), batches()
    head = take(stopped, stop, flat)
    resumed.load_state_dict(stopped.state_dict())
    assert head + take(resumed, 150 - stop, flat) == whole


def test_an_epoch_of_batches_holds_every_piece_once(paths, tokenizer):
    batches = StreamedBatches(StreamedRows(paths, tokenizer, seed=3, buffer=BUFFER), 21, longest=8)
    pieces = []
    for _ in range(2):
        found = list(batches)
        assert all(batch.tokens <= 21 for batch in found)
        starts = [
            (batch, *place) for batch in found for place in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)
        ]
        pieces.append(sorted(tokenizer.decode(batch.source[0, a:b].tolist()) for batch, a, b in starts))
    assert pieces[0] == pieces[1] == sorted(line[at : at + 8] for line in LINES for at in range(0, len(line), 8))


def test_in_order_it_packs_as_documents_in_memory_do(paths, tokenizer):
    streamed = StreamedBatches(StreamedRows(paths, tokenizer), 30)
    packed = PackedBatches(tokenizer.encode_all(LINES), 30)
    assert [flat(batch) for batch in streamed] == [flat(batch) for batch in packed]


def test_lines_are_prepared_and_empty_ones_left_out(tmp_path, tokenizer):
    (tmp_path / "c.txt").write_text("好<br>\n<br>\n好好\n", "utf-8")
    from tileformer.training.data.text import clean

    rows = StreamedRows([tmp_path / "c.txt"], tokenizer, prepare=clean)
    assert [tokenizer.decode(row) for row in rows] == ["好", "", "好好"]
    (batch,) = StreamedBatches(rows, 30)
    assert batch.cu_seqlens.tolist() == [0, 2, 5]


def test_a_byte_order_mark_is_no_text(tmp_path, tokenizer):
    (tmp_path / "d.txt").write_bytes("\ufeff好\n\ufeff\n好好\n".encode())  # two files joined: the second mark stays
    rows = StreamedRows(iter([tmp_path / "d.txt"]), tokenizer)
    assert list(rows) == [tokenizer.encode(line) for line in ("好", "\ufeff", "好好")]


def test_bad_files_are_named_with_the_line(tmp_path, tokenizer):
    def error(content, **options):
        (tmp_path / "bad.txt").write_bytes(content)
        with pytest.raises(ValueError) as caught:
            StreamedRows([tmp_path / "bad.txt"], tokenizer, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value).removeprefix(str(tmp_path))

    assert error("好\n坏好\n".encode("gb18030")).startswith("/bad.txt:1: byte 0xba at offset 0 is not utf-8")
    late = error("好好\n\n".encode() + b"a\xe9b")
    assert late.startswith("/bad.txt:3: byte 0xe9 at offset 9 is not utf-8 text; most of it is: mend 1 of 3 lines, or")
    assert "bad.txt:2: a line of over 5 bytes" in error(b"ab\nabcdef\n", longest_line=5)
    (tmp_path / "fits.txt").write_bytes(b"ab\nabcdef\n")
    assert len(StreamedRows([tmp_path / "fits.txt"], tokenizer, longest_line=7)) == 2
    assert error(b" \n\n").endswith("bad.txt")
    assert "no text" in error(b"")
    with pytest.raises(ValueError, match="no text in no files"):
        StreamedRows([], tokenizer)


@pytest.mark.parametrize("buffer", [GROUP, 4 << 20])  # a block a line, and one block
def test_bad_lines_can_be_left_out(tmp_path, tokenizer, buffer):
    path = tmp_path / "bad.txt"
    path.write_bytes("\ufeff好\n".encode() + b"\xff\n" + "好好\na\0\n\n好\ufffd\n好好好".encode())
    with pytest.warns(UserWarning, match=r"bad\.txt: 3 lines are no utf-8 text and left out, the first is 2$"):
        rows = StreamedRows([path], tokenizer, buffer=buffer, skip_bad_lines=True)
    assert [tokenizer.decode(row) for row in rows] == ["好", "好好", "好好好"] and len(rows) == 3


def test_a_file_that_changes_is_refused(paths, tokenizer):
    rows = StreamedRows(paths, tokenizer, seed=0, buffer=BUFFER)
    paths[1].write_bytes(b"\n" * paths[1].stat().st_size)
    with pytest.raises(ValueError, match=r"b\.txt:\d+: the file changed"):
        list(rows)


def test_other_data_than_the_checkpoints_are_refused(paths, tokenizer):
    state = StreamedBatches(StreamedRows(paths, tokenizer, seed=3), 30).state_dict()
    others = Tokenizer.train(LINES, minimum=2)
    for rows, size in (
        (StreamedRows(paths[:1], tokenizer, seed=3), 30),
        (StreamedRows(paths[::-1], tokenizer, seed=3), 30),
        (StreamedRows(paths, tokenizer, seed=4), 30),
        (StreamedRows(paths, others, seed=3), 30),
        (StreamedRows(paths, tokenizer, seed=3), 31),
    ):
        with pytest.raises(ValueError, match="the data differ"):
            StreamedBatches(rows, size).load_state_dict(state)
    with pytest.raises(ValueError, match="the data differ from the checkpoint's: longest was None, is 8"):
        StreamedBatches(StreamedRows(paths, tokenizer, seed=3), 30, longest=8).load_state_dict(state)


def test_a_line_that_fits_no_batch_is_named(paths, tokenizer):
    with pytest.raises(ValueError, match="exceed batch_tokens 9; give `longest`"):
        list(StreamedBatches(StreamedRows(paths, tokenizer), 9))
