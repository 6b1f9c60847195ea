"""Augmentation: rows keep what they should, nothing is emptied, and one random state gives one row."""

import random
from functools import partial

import pytest

from tileformer.training.data.augment import shuffle_segments, span_mask, token_dropout

ROW = list(range(10, 50))
DELETE = partial(token_dropout, replace=None)


@pytest.mark.parametrize("augment", [token_dropout, DELETE, span_mask, shuffle_segments])
def test_the_same_state_gives_the_same_row_and_the_input_stays(augment):
    row = list(ROW)
    made = [augment(row, random.Random(seed)) for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2] and row == ROW


@pytest.mark.parametrize(
    "augment", [partial(token_dropout, rate=0.9), partial(DELETE, rate=0.9), span_mask, shuffle_segments]
)
@pytest.mark.parametrize("length", [0, 1, 2])
def test_short_rows_are_never_emptied(augment, length):
    for seed in range(50):
        assert bool(augment(ROW[:length], random.Random(seed))) is (length > 0)


def test_token_dropout_replaces_or_deletes_at_its_rate():
    long = ROW * 100
    replaced, deleted = token_dropout(long, random.Random(0), rate=0.3), DELETE(long, random.Random(0), rate=0.3)
    assert len(replaced) == len(long) and 0.28 < replaced.count(3) / len(long) < 0.32
    assert deleted == [number for number in replaced if number != 3]
    assert token_dropout(long, random.Random(0), rate=0.0) == long
    assert [number if number != 3 else 7 for number in replaced] == token_dropout(
        long, random.Random(0), rate=0.3, replace=7
    )
    left = {DELETE(ROW, random.Random(seed), rate=1 - 1e-9)[0] for seed in range(20)}
    assert len(left) > 5  # of a row that would be empty any id may stay


def test_span_mask_hides_runs_and_exactly_its_share():
    for seed in range(20):
        masked = span_mask(ROW, random.Random(seed), rate=0.3, span=3, mask=9)
        assert masked.count(9) == 12 and all(a in (b, 9) for a, b in zip(masked, ROW, strict=True))
    short = [span_mask(ROW[:9], random.Random(seed), rate=0.3, mask=9) for seed in range(50)]
    assert {row.count(9) for row in short} == {2}  # 2.7, rounded down
    assert all(any(row[place] == 9 for row in short) for place in range(9))
    long = span_mask(ROW * 100, random.Random(0), rate=0.15, span=3, mask=9)
    runs = sum(a != 9 == b for a, b in zip([0, *long], long, strict=False))
    assert 2.5 < long.count(9) / runs < 4.5  # single ids hidden at this rate would make runs of 1.2


def test_segments_keep_their_inside():
    made = shuffle_segments(ROW, random.Random(3), segments=4)
    assert sorted(made) == ROW != made
    assert sum(b - a != 1 for a, b in zip(made, made[1:], strict=False)) <= 3
    assert shuffle_segments(ROW, random.Random(0), segments=1) == ROW


@pytest.mark.parametrize(
    "augment, message",
    [
        (partial(token_dropout, rate=1.0), r"rate must be in \[0, 1\), got 1.0"),
        (partial(span_mask, rate=-0.1), r"rate must be in \[0, 1\), got -0.1"),
        (partial(span_mask, span=0), "span must be at least 1, got 0"),
        (partial(shuffle_segments, segments=0), "segments must be at least 1, got 0"),
    ],
)
def test_settings_without_sense_are_refused(augment, message):
    with pytest.raises(ValueError, match=message):
        augment(ROW, random.Random(0))
