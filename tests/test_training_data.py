"""Batches: every example once an epoch, the same order for the same seed, resumable at any batch."""

import pytest
import torch

from tileformer.training import Batches

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
    for batches in (Batches(PAIRS[:-1], 8, seed=3), Batches(PAIRS, 9, seed=3), Batches(PAIRS, 8, seed=4)):
        with pytest.raises(ValueError, match=r"the data differ .* was \d+, is \d+"):
            batches.load_state_dict(state)


@pytest.mark.parametrize(
    "pairs, size, message", [([], 1, "no examples"), ([([], [3])], 1, "1 of 1"), (PAIRS, 0, "at least 1, got 0")]
)
def test_unusable_input_is_refused(pairs, size, message):
    with pytest.raises(ValueError, match=message):
        Batches(pairs, size)
