"""The window of MixGRPO: always full, everywhere in time, and the same for everyone."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.errors import EtudeError
from etude.registry import WINDOWS
from etude.sampling.kernels import GDDIM, FlowSDE
from etude.sampling.paths import FlowPath, VPPath
from etude.sampling.plans import SamplingPlan
from etude.sampling.windows import (
    DecayWindow,
    ProgressiveWindow,
    RandomWindow,
    WindowSchedule,
    make_window,
    trainable_range,
)

STRATEGIES = tuple(WINDOWS.builtin)

PATH = VPPath.from_config({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
FLOW = FlowPath.from_config({"shift": 3.0})


@st.composite
def schedules(draw, strategies=STRATEGIES):
    start, size = draw(st.integers(0, 4)), draw(st.integers(1, 6))
    settings = {
        "stop": start + size + draw(st.integers(0, 12)),
        "start": start,
        "size": size,
        "iters_per_shift": draw(st.integers(1, 30)),
        "stride": draw(st.integers(1, size)),
        "roll_back": draw(st.booleans()),
        "seed": draw(st.integers(0, 3)),
        "decay_rate": draw(st.floats(0, 2)),
        "decay_threshold": draw(st.integers(0, 20)),
    }
    return make_window(draw(st.sampled_from(strategies)), settings)


def is_full(schedule: WindowSchedule, place: int) -> bool:
    return schedule.start <= place and place + schedule.size <= schedule.stop


@pytest.mark.parametrize("roll_back", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_window_is_full_in_each_of_10_000_iterations_and_trains_every_step(strategy, roll_back):
    settings = {"stop": 24, "start": 1, "size": 4, "stride": 3, "roll_back": roll_back, "iters_per_shift": 25}
    schedule = make_window(strategy, settings)
    places = [schedule.start_at(i) for i in range(1, 10_001)]
    assert all(is_full(schedule, place) for place in places)
    visited = {place + k for place in places for k in range(4)}
    assert visited == (set(range(1, 5)) if strategy == "fixed" else set(range(1, 24)))


@settings(max_examples=60, deadline=None)
@given(schedule=schedules(), iteration=st.integers(1, 10**9))
def test_the_window_is_full_at_any_iteration_size_and_stride(schedule, iteration):
    assert is_full(schedule, schedule.start_at(iteration))


@settings(max_examples=60, deadline=None)
@given(schedule=schedules(("progressive", "decay")))
def test_a_moving_window_visits_every_trainable_step_within_one_round(schedule):
    round_length = sum(map(schedule.dwell, schedule.places))
    places = [schedule.start_at(i) for i in range(1, round_length + 1)]
    assert {place + k for place in places for k in range(schedule.size)} == set(range(schedule.start, schedule.stop))
    assert places == sorted(places)
    after = schedule.start_at(round_length + 1)
    assert after == (schedule.start if schedule.roll_back else schedule.stop - schedule.size)


@settings(max_examples=60, deadline=None)
@given(schedule=schedules(("decay",)))
def test_a_decaying_window_never_stays_longer_than_at_the_place_before(schedule):
    stays = [
        len(list(run))
        for _, run in groupby(map(schedule.start_at, range(1, sum(map(schedule.dwell, schedule.places)) + 1)))
    ]
    assert stays == [schedule.dwell(place) for place in schedule.places]
    assert stays == sorted(stays, reverse=True)


def test_the_dwell_falls_exponentially_beyond_the_threshold_and_never_to_0():
    schedule = DecayWindow(stop=100, iters_per_shift=1000, decay_rate=0.1, decay_threshold=13)
    assert [schedule.dwell(place) for place in (0, 5, 13)] == [1000] * 3
    assert [schedule.dwell(place) for place in (14, 23, 33)] == [round(1000 * math.exp(-x)) for x in (0.1, 1.0, 2.0)]
    assert schedule.dwell(96) == 1


def test_a_progressive_window_moves_by_its_stride_after_each_shift_and_ends_with_the_last_step():
    schedule = ProgressiveWindow(stop=11, start=1, size=4, stride=2, iters_per_shift=3)
    assert schedule.places == (1, 3, 5, 7)
    assert replace(schedule, stride=4).places == (1, 5, 7)
    assert [schedule.start_at(i) for i in range(1, 16)] == [1, 1, 1, 3, 3, 3, 5, 5, 5, 7, 7, 7, 1, 1, 1]


def test_without_roll_back_the_window_stays_on_the_last_full_place():
    schedule = ProgressiveWindow(stop=25, size=4, iters_per_shift=25, roll_back=False)
    assert {schedule.start_at(i) for i in (526, 575, 576, 10_000)} == {21}


def test_a_random_window_is_uniform_over_its_places_and_a_function_of_seed_and_iteration():
    schedule = RandomWindow(stop=10, start=1, size=4, seed=3)
    drawn = [schedule.start_at(i) for i in range(1, 6001)]
    assert drawn == [RandomWindow(stop=10, start=1, size=4, seed=3).start_at(i) for i in range(1, 6001)]
    counts = Counter(drawn)
    assert set(counts) == set(range(1, 7))
    assert sum((n - 1000) ** 2 / 1000 for n in counts.values()) < 20.5  # chi^2 of 5 degrees of freedom, 99.9 %
    assert drawn[:50] != [replace(schedule, seed=4).start_at(i) for i in range(1, 51)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "progresive"}, "did you mean 'progressive'"),
        ({"size": 0}, "does not fit"),
        ({"size": 11}, "does not fit in steps 0 to 9"),
        ({"start": 7}, "does not fit"),
        ({"start": -1}, "does not fit"),
        ({"stride": 5}, "would pass over steps"),
        ({"stride": 0}, "stride from 1 to 4"),
        ({"iters_per_shift": 0}, "at least 1 iteration"),
        ({"decay_rate": -0.1}, "decay_rate"),
        ({"decay_rate": math.nan}, "decay_rate"),
    ],
)
def test_a_schedule_that_could_not_be_followed_is_refused(change, message):
    with pytest.raises(EtudeError, match=message):
        make_window(change.pop("strategy", "decay"), {"stop": 10, **change})


def test_only_stochastic_steps_can_be_trained():
    def found(path, kernel, num_steps=25, **options):
        return trainable_range(SamplingPlan.sde(num_steps, kernel, **options).tabulate(path.grid(num_steps)))

    assert found(PATH, GDDIM(1.2)) == range(24)
    assert found(FLOW, GDDIM(1.2)) == found(FLOW, FlowSDE(0.7)) == range(1, 24)
    assert found(FLOW, GDDIM(1.2), first_step="sde") == range(24)
    with pytest.raises(EtudeError, match="none of the 25"):
        found(FLOW, GDDIM(0.0))
    with pytest.raises(EtudeError, match="none of the 1 sampling steps"):
        found(PATH, GDDIM(1.2), num_steps=1)


def test_a_deterministic_step_in_the_middle_has_no_window():
    table = SamplingPlan.from_etas([1.0, 0.0, 1.0, 1.0]).tabulate(PATH.grid(4))
    with pytest.raises(EtudeError, match="step 1 is deterministic"):
        trainable_range(table)


@settings(max_examples=40, deadline=None)
@given(
    num_steps=st.integers(3, 12),
    size=st.integers(1, 4),
    iteration=st.integers(1, 500),
    strategy=st.sampled_from(STRATEGIES),
)
def test_every_step_of_a_window_over_the_trainable_range_is_trained(num_steps, size, iteration, strategy):
    grid, kernel = FLOW.grid(num_steps), GDDIM(1.2)
    steps = trainable_range(SamplingPlan.sde(num_steps, kernel).tabulate(grid))
    size = min(size, len(steps))
    window = make_window(strategy, {"stop": steps.stop, "start": steps.start, "size": size, "iters_per_shift": 2})
    start = window.start_at(iteration)
    table = SamplingPlan.window(num_steps, kernel, start, size).tabulate(grid)
    assert table.trained_steps == tuple(range(start, start + size))
