"""Batches: every example once an epoch, the same order for the same seed, resumable at any batch."""

import itertools
from functools import partial

import pytest
import torch

from tileformer.training import Batches
from tileformer.training.data.augment import token_dropout
from tileformer.training.data.batches import LabelledBatches, PackedBatches

# Lengths 1..9 and 0..6, 103 examples: ragged in both sequences, and no multiple of the batch size.
PAIRS = [([3 + i % 5] * (1 + i % 9), [100 + i] * (1 + i % 7)) for i in range(103)]


def identities(batches):
    """The rows of each batch, by the number that stands in each target."""
    return [batch.labels[:, 0].tolist() for batch in batches]


@pytest.mark.parametrize("seed", [None, 5])
def test_every_example_comes_once_an_epoch(seed):
    batches = Batches(PAIRS, 8, seed=seed, pool=3)
    for _ in range(2):
        epoch = identities(batches)
        assert len(epoch) == len(batches) == 13  # pools of 24 rows, the last one of 7
        assert sorted(sum(epoch, [])) == [100 + i for i in range(103)]


def test_the_order_follows_from_seed_and_epoch_alone():
    first, again, other = (Batches(PAIRS, 8, seed=seed) for seed in (1, 1, 2))
    epochs = [identities(first), identities(first)]
    assert epochs == [identities(again), identities(again)]
    assert epochs[0] != epochs[1] and epochs[0] != identities(other)


@pytest.mark.parametrize("seed", [0, 5])
def test_rows_are_shuffled_then_sorted_in_pools_then_the_batches_shuffled(seed):
    lengths = [
        [(len(PAIRS[n - 100][0]), len(PAIRS[n - 100][1])) for n in batch]
        for batch in identities(Batches(PAIRS, 8, seed=seed))
    ]
    assert all(batch == sorted(batch) for batch in lengths)  # by the source, then by the target
    assert lengths != sorted(lengths)
    alone = identities(Batches(PAIRS, 8, seed=seed, pool=1))  # a pool is a batch: only the rows' own shuffle mixes them
    assert sum(max(batch) - min(batch) < len(batch) for batch in alone) < 2
    widths = [[len(PAIRS[n - 100][0]) for n in batch] for batch in alone]
    assert sum(max(batch) - min(batch) > 3 for batch in widths) > 9  # and nothing has sorted them by length


def test_a_batch_pads_on_the_right_and_counts_without_padding():
    (batch,) = Batches([([5, 6], [7]), ([5, 6, 7], [8, 9])], 2)
    assert batch.source.tolist() == [[5, 6, 0], [5, 6, 7]]
    assert batch.target.tolist() == [[1, 7, 0], [1, 8, 9]]
    assert batch.labels.tolist() == [[7, 2, 0], [8, 9, 2]]
    assert batch.source.dtype == batch.target.dtype == batch.labels.dtype == torch.int64
    assert (batch.source_tokens, batch.label_tokens, batch.tokens) == (5, 5, 10)


def test_similar_lengths_share_a_batch():
    bucketed = Batches(PAIRS, 8, seed=0)
    width = sum(batch.source.numel() for batch in bucketed)
    letters = sum(len(source) for source, _ in PAIRS)
    assert letters / width > 0.85  # unsorted batches of these lengths would be near 0.56


@pytest.mark.parametrize("stop", [0, 1, 12, 13, 20], ids=lambda stop: f"after {stop}")  # 13 ends the first epoch
def test_resumes_at_the_exact_batch(stop):
    def take(batches, count):
        rows = []
        while len(rows) < count:
            for batch in batches:
                rows.append(batch.labels[:, 0].tolist())
                if len(rows) == count:
                    break
        return rows

    whole = take(Batches(PAIRS, 8, seed=3, pool=3), 30)
    stopped, resumed = Batches(PAIRS, 8, seed=3, pool=3), Batches(PAIRS, 8, seed=3, pool=3)
    head = take(stopped, stop)
    resumed.load_state_dict(stopped.state_dict())
    assert head + take(resumed, 30 - stop) == whole


def test_other_data_than_the_checkpoints_are_refused():
    state = Batches(PAIRS, 8, seed=3).state_dict()
    for batches in (
        Batches(PAIRS[:-1], 8, seed=3),
        Batches(PAIRS, 9, seed=3),
        Batches(PAIRS, 8, seed=4),
        Batches(PAIRS, 8, seed=3, pool=49),
    ):
        with pytest.raises(ValueError, match=r"the data differ .* was \d+, is \d+"):
            batches.load_state_dict(state)


@pytest.mark.parametrize(
    "pairs, size, message", [([], 1, "no examples"), ([([], [3])], 1, "1 of 1"), (PAIRS, 0, "at least 1, got 0")]
)
def test_unusable_input_is_refused(pairs, size, message):
    with pytest.raises(ValueError, match=message):
        Batches(pairs, size)


ROWS = [[3 + i % 5] * (1 + i % 9) for i in range(103)]
half_dropped = partial(token_dropout, rate=0.5)


def test_labelled_rows_keep_their_labels_and_weights():
    batches = LabelledBatches(ROWS, [i % 4 for i in range(103)], 8, seed=1, pool=3, weights=[i / 2 for i in range(103)])
    seen = []
    for batch in batches:
        assert batch.labels.tolist() == [row % 4 for row in batch.rows]
        assert batch.weights.tolist() == [row / 2 for row in batch.rows]
        width = max(len(ROWS[row]) for row in batch.rows)
        assert batch.source.tolist() == [ROWS[row] + [0] * (width - len(ROWS[row])) for row in batch.rows]
        assert batch.tokens == batch.source_tokens == sum(len(ROWS[row]) for row in batch.rows)
        assert batch.label_tokens == len(batch.rows)
        assert (batch.source.dtype, batch.labels.dtype, batch.weights.dtype) == (
            torch.int64,
            torch.int64,
            torch.float32,
        )
        seen += batch.rows
    assert sorted(seen) == list(range(103))


def test_labelled_rows_come_in_the_order_of_pairs():
    pairs = Batches([(row, [100 + i]) for i, row in enumerate(ROWS)], 8, seed=4, pool=3)
    rows = [list(batch.rows) for batch in LabelledBatches(ROWS, [0] * 103, 8, seed=4, pool=3)]
    assert rows == [[number - 100 for number in batch] for batch in identities(pairs)]


@pytest.mark.parametrize("stop", [0, 5, 13, 20])
def test_augmented_rows_are_others_each_epoch_and_the_same_after_a_resume(stop):
    def batches():
        return LabelledBatches([[*range(3, 23)]] * 40, [0] * 40, 6, seed=2, augment=half_dropped)

    def take(source, count):
        stream = itertools.chain.from_iterable(itertools.repeat(source))
        return [batch.source.tolist() for batch in itertools.islice(stream, count)]

    whole = take(batches(), 21)  # three epochs
    assert len({str(row) for batch in whole for row in batch}) > 100
    stopped, resumed = batches(), batches()
    head = take(stopped, stop)
    resumed.load_state_dict(stopped.state_dict())
    assert head + take(resumed, 21 - stop) == whole


def test_augmentation_follows_the_seed_and_the_row_and_leaves_the_data():
    rows = [[*range(3, 23)] for _ in range(40)]

    def found(seed, size):
        augment = lambda row, draw: row.reverse() or half_dropped(row, draw)  # noqa: E731  # one that works in place
        batches = LabelledBatches(rows, [0] * 40, size, seed=seed, augment=augment)
        return {row: ids for batch in batches for row, ids in zip(batch.rows, batch.source.tolist(), strict=True)}

    assert found(0, 6) == found(0, 7)  # the same row, whichever its batch
    assert all(found(0, 6)[row] != found(1, 6)[row] for row in range(40))
    assert rows == [[*range(3, 23)]] * 40


@pytest.mark.parametrize(
    "labels, options, message",
    [
        ([0] * 102, {}, "103 rows need as many labels, got 102"),
        ([0] * 103, {"weights": [1.0]}, "103 rows need as many weights, got 1"),
        ([0] * 102 + [-1], {}, "labels must be 0 or more, got -1"),
        ([0] * 103, {"weights": [-0.5] * 103}, "weights must be 0 or more, got -0.5"),
        ([0] * 103, {"augment": token_dropout}, "augment needs a seed"),
    ],
)
def test_unusable_labels_are_refused(labels, options, message):
    with pytest.raises(ValueError, match=message):
        LabelledBatches(ROWS, labels, 8, **options)
    with pytest.raises(ValueError, match="1 of 2 examples have an empty source"):
        LabelledBatches([[3], []], [0, 1], 8)


def test_packed_documents_stand_end_to_end_and_predict_themselves_alone():
    first, second = PackedBatches([[5, 6], [7], [8, 9, 5]], 6)
    assert first.source.tolist() == [[1, 5, 6, 1, 7]] and first.labels.tolist() == [[5, 6, 2, 7, 2]]
    assert second.source.tolist() == [[1, 8, 9, 5]] and second.labels.tolist() == [[8, 9, 5, 2]]
    assert first.cu_seqlens.tolist() == [0, 3, 5] and first.cu_seqlens.dtype == torch.int32
    assert (first.tokens, first.source_tokens, first.label_tokens, first.longest, second.longest) == (5, 5, 5, 3, 4)
    assert first.source.dtype == first.labels.dtype == torch.int64


@pytest.mark.parametrize("seed", [None, 0, 5])
def test_every_document_is_packed_once_an_epoch(seed):
    documents = [[100 + i] * (1 + i % 9) for i in range(103)]
    batches = PackedBatches(iter(documents), 16, seed=seed)  # a generator will do: the ids are copied
    epochs = []
    for _ in range(2):
        count = len(batches)
        found = list(batches)
        assert len(found) == count and all(batch.tokens <= 16 for batch in found)
        ends = [(batch, *place) for batch in found for place in itertools.pairwise(batch.cu_seqlens)]
        epochs.append([batch.source[0, a + 1 : b].tolist() for batch, a, b in ends])
        assert sum(batch.tokens for batch in found) / (16 * count) > 0.75
    assert all(sorted(epoch) == documents for epoch in epochs)
    assert (epochs[0] == documents and epochs[1] == documents) is (seed is None)
    assert (epochs[0] == epochs[1]) is (seed is None)


def test_long_documents_are_cut_into_documents():
    (batch,) = PackedBatches([[4, 5, 6, 7, 8], [9]], 20, longest=2)
    assert batch.source.tolist() == [[1, 4, 5, 1, 6, 7, 1, 8, 1, 9]]
    assert batch.labels.tolist() == [[4, 5, 2, 6, 7, 2, 8, 2, 9, 2]]


@pytest.mark.parametrize("stop", [0, 1, 30, 70])
def test_packed_batches_resume_at_the_exact_batch(stop):
    def take(source, count):
        stream = itertools.chain.from_iterable(itertools.repeat(source))
        return [batch.source.tolist() for batch in itertools.islice(stream, count)]

    whole = take(PackedBatches(ROWS, 16, seed=3), 100)
    stopped, resumed = PackedBatches(ROWS, 16, seed=3), PackedBatches(ROWS, 16, seed=3)
    head = take(stopped, stop)
    resumed.load_state_dict(stopped.state_dict())
    assert head + take(resumed, 100 - stop) == whole
    others = (ROWS[1:], 16, 3), ([*ROWS[:-1], ROWS[-1][:-1]], 16, 3), (ROWS, 17, 3), (ROWS, 16, None)
    for other in (PackedBatches(rows, size, seed=seed) for rows, size, seed in others):
        with pytest.raises(ValueError, match="the data differ"):
            other.load_state_dict(stopped.state_dict())


@pytest.mark.parametrize(
    "documents, options, message",
    [
        ([], {}, "no documents to pack"),
        ([[3], []], {}, "document 1 is empty"),
        ([[3], [4] * 16], {}, "document 1: 16 ids and bos exceed batch_tokens 16; give `longest`"),
        ([[3]], {"longest": 0}, "longest must be at least 1, got 0"),
    ],
)
def test_unusable_documents_are_refused(documents, options, message):
    with pytest.raises(ValueError, match=message):
        PackedBatches(documents, 16, **options)
    assert [batch.tokens for batch in PackedBatches([[3], [4] * 15], 16)] == [2, 16]  # which just fits


@pytest.mark.parametrize(
    "batches", [Batches(PAIRS, 2), LabelledBatches(ROWS, [0] * 103, 2, weights=[1] * 103), PackedBatches(ROWS, 16)]
)
def test_a_batch_moves_whole(batches):
    batch = next(iter(batches))
    assert batch.to(torch.device("cpu")) is batch
    moved = batch.to(torch.device("meta"))
    for name, value in vars(batch).items():
        now = getattr(moved, name)
        assert now.device.type == "meta" if isinstance(value, torch.Tensor) else now == value
    assert (moved.tokens, moved.label_tokens) == (batch.tokens, batch.label_tokens)
