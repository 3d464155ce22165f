import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekern.prune.schedules import Constant, Cubic, Iterative, OneShot


def updates(schedule, steps=200):
    return [t for t in range(steps) if schedule.is_update(t)]


def test_cubic_is_the_formula_of_the_paper_at_its_update_steps():
    initial, final, start, count, every = 0.1, 0.87, 20, 10, 7
    schedule = Cubic(initial, final, start, start + count * every, every)
    assert updates(schedule) == [start + i * every for i in range(count + 1)]
    for t in updates(schedule):
        wanted = final + (initial - final) * (1 - (t - start) / (count * every)) ** 3
        assert schedule.sparsity(t) == pytest.approx(wanted, abs=1e-12)
    assert schedule.sparsity(schedule.last) == final  # exactly
    assert schedule.sparsity(0) == initial and schedule.sparsity(10**6) == final


@given(
    st.floats(0, 0.5),
    st.floats(0.5, 0.99),
    st.integers(0, 50),
    st.integers(1, 80),
    st.integers(1, 9),
)
def test_cubic_rises_within_its_bounds_and_ends_exactly(initial, final, start, length, every):
    schedule = Cubic(initial, final, start, start + length, every)
    values = [schedule.sparsity(t) for t in range(150)]
    assert values == sorted(values) and values[0] == initial
    assert schedule.sparsity(start + length) == final
    assert schedule.is_update(start) and schedule.is_update(start + length)
    assert max(updates(schedule, 150)) == schedule.last == start + length


def test_one_shot():
    schedule = OneShot(0.9, at=3)
    assert [schedule.sparsity(t) for t in range(5)] == [0, 0, 0, 0.9, 0.9]
    assert updates(schedule) == [3] and schedule.last == 3 and updates(OneShot(0.5)) == [0]


def test_constant():
    assert updates(Constant(0.8)) == [0] and Constant(0.8).last == 0
    schedule = Constant(0.8, every=30, end=100)
    assert updates(schedule) == [0, 30, 60, 90] and schedule.last == 90
    assert {schedule.sparsity(t) for t in range(200)} == {0.8}
    assert Constant(0.8, every=50).last is None and updates(Constant(0.8, every=50))[-1] == 150


def test_iterative_drops_the_same_share_of_what_is_left():
    schedule = Iterative(0.9, rounds=4, every=10)
    assert updates(schedule) == [10, 20, 30, 40] and schedule.last == 40
    density = [1 - schedule.sparsity(t) for t in (9, 10, 19, 20, 30, 40, 1000)]
    share = 0.1**0.25
    wanted = [1, share, share, share**2, share**3, 0.1, 0.1]
    assert density == pytest.approx(wanted) and schedule.sparsity(40) == 0.9
    assert updates(Iterative(0.9, rounds=2, every=10, start=0)) == [0, 10]


def test_schedules_are_frozen_and_compare_by_value():
    assert Cubic(0, 0.9, 0, 10) == Cubic(0, 0.9, 0, 10, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        OneShot(0.5).at = 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OneShot(1.2), r"schedules.OneShot: expected sparsity in \[0, 1\), got 1.2"),
        (lambda: OneShot(0.9, at=-1), "schedules.OneShot: expected at to be an int >= 0, got -1"),
        (
            lambda: Constant(0.9, every=0),
            "schedules.Constant: expected every to be an int >= 1, got",
        ),
        (lambda: Constant(0.9, 5, end=0.5), "schedules.Constant: expected end to be an int >= 0"),
        (
            lambda: Cubic(0, 0.9, 50, 20),
            "schedules.Cubic: expected end > start, got start=50, end=20",
        ),
        (
            lambda: Cubic(0.9, 0.5, 0, 9),
            "schedules.Cubic: expected initial <= final, got 0.9 > 0.5",
        ),
        (lambda: Cubic(-1, 0.5, 0, 9), r"schedules.Cubic: initial: expected sparsity in \[0, 1\)"),
        (lambda: Iterative(0.9, 0, 9), "schedules.Iterative: expected rounds to be an int >= 1"),
        (lambda: Iterative(0.9, 1, True), "schedules.Iterative: expected every to be an int >= 1"),
    ],
)
def test_bad_fields_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
