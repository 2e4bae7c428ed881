import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_memguard.core.schedule import RoundSchedule
from tests.reference.slow_guard import slow_schedule


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 7), st.integers(1, 90), st.booleans())
def test_schedule_equals_dealing_the_budget_out(total_steps, num_shards, steps_per_round, redistributes):
    schedule = RoundSchedule.plan(total_steps, num_shards, steps_per_round, redistributes)
    found = [
        (schedule.kind(r), [schedule.steps_in_round(r, k) for k in range(num_shards)])
        for r in range(schedule.num_rounds)
    ]
    assert found == slow_schedule(total_steps, num_shards, steps_per_round, redistributes)
    assert sum(sum(steps) for _, steps in found) == total_steps
    assert [sum(steps[k] for _, steps in found) for k in range(num_shards)] == [
        schedule.shard_steps(k) for k in range(num_shards)
    ]
    assert found[-1][0] == "average"


@pytest.mark.parametrize(
    ("rounds", "redistributes", "expected"),
    [(1, True, "a"), (2, True, "ra"), (5, True, "raraa"), (6, True, "rarara"), (4, False, "aaaa")],
)
def test_kinds_alternate_and_the_last_round_averages(rounds, redistributes, expected):
    schedule = RoundSchedule.plan(20 * rounds, 2, 10, redistributes)
    assert "".join(schedule.kind(r)[0] for r in range(schedule.num_rounds)) == expected


def test_one_shard_never_redistributes():
    schedule = RoundSchedule.plan(40, 1, 10, redistributes=True)
    assert [schedule.kind(r) for r in range(4)] == ["average"] * 4


@pytest.mark.parametrize(
    ("total_steps", "num_shards", "steps_per_round", "num_rounds"),
    [(10, 1, 50, 1), (1200, 2, 100, 6), (1201, 2, 101, 6), (4, 8, 50, 1), (80_000, 4, 1000, 20), (300, 1, 50, 6)],
)
def test_auto_makes_six_rounds_within_limits(total_steps, num_shards, steps_per_round, num_rounds):
    schedule = RoundSchedule.plan(total_steps, num_shards, "auto", redistributes=True)
    assert (schedule.steps_per_round, schedule.num_rounds) == (steps_per_round, num_rounds)
