"""Schedules from costs alone: whoever makes the order, the bound is under it."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_cases import numbers_for

from planner.errors import InfeasibleError, LayoutError, ScheduleError
from planner.schedule.families import FAMILIES
from planner.scheduling import PipelineCosts, schedule_costs

time_us = st.floats(1, 20)


@given(
    st.sampled_from(sorted(FAMILIES)),
    st.integers(1, 3),
    st.integers(1, 5),
    st.tuples(time_us, time_us, st.floats(0, 20), st.floats(0, 6)),
    st.tuples(st.integers(1, 9), st.integers(0, 18)),
    st.sampled_from(["span", "makespan"]),
    st.booleans(),
)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_no_family_is_under_the_bound_it_is_given(name, p, m, times, held, objective, tight):
    forward, backward, weight, p2p = times
    costs = PipelineCosts((forward,), (backward,), (weight,), p2p, *held)
    m, v = numbers_for(FAMILIES[name], p, m)
    arguments = {"num_ranks": p, "num_microbatches": m, "virtual_stages": v, "family": name, "objective": objective}
    free = schedule_costs(costs, **arguments)
    limit = max(free.peak_memory) / costs.activation_bytes if tight else None
    answer = schedule_costs(costs, memory_limit=limit, **arguments)
    value = answer.span_us if objective == "span" else answer.makespan_us
    assert answer.lower_bound_us <= value
    assert answer.gap >= 0
    assert (answer.status == "optimal") == (answer.lower_bound_us == value)


def test_auto_is_never_worse_than_a_family_under_the_same_memory():
    costs = PipelineCosts((11.0, 9.0, 13.0), (10.0, 12.0, 9.0), (5.0, 6.0, 4.0), 1.0)
    for name in ("1f1b", "zb-h1"):
        family = schedule_costs(costs, num_ranks=3, num_microbatches=6, family=name, memory_limit=3)
        auto = schedule_costs(costs, num_ranks=3, num_microbatches=6, memory_limit=3, time_limit_s=5)
        assert auto.span_us <= family.span_us


ONES = PipelineCosts((1.0,), (1.0,), (1.0,), 0.0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_ranks": 0}, LayoutError, "p=0, m=4, v=1: ranks, microbatches and chunks count from 1"),
        ({"num_ranks": 10**6, "num_microbatches": 10**6}, LayoutError, "make 3000000000000 actions; at most 2500000"),
        ({"memory_limit": -1.0}, LayoutError, "memory limit -1.0: give a number of microbatches above 0"),
        ({"time_limit_s": float("nan")}, LayoutError, "time limit nan: give a finite number of seconds"),
        ({"solver": "gurobi"}, LayoutError, "no solver is called 'gurobi'; known: auto, list-scheduling, periodic"),
        ({"family": "zb-h9"}, ScheduleError, "no schedule family is called 'zb-h9'"),
        ({"family": "1f1b", "virtual_stages": 2}, LayoutError, "family '1f1b': it runs one stage per rank"),
        (
            {"memory_limit": 0.5},
            InfeasibleError,
            "rank 0 holds 2 with a single microbatch, and the memory limit of 0.5 microbatches is 1; raise the limit",
        ),
        ({"num_microbatches": 400, "solver": "cbc"}, LayoutError, "solver 'cbc' does not take this problem: 2400 ops"),
    ],
)
def test_questions_without_an_answer_are_refused(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        schedule_costs(ONES, **{"num_ranks": 2, "num_microbatches": 4, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"forward_us": (0.0,)}, "forward_us: 0.0 is not a time"),
        ({"weight_us": (-1.0,)}, "weight_us: -1.0 is not a time"),
        ({"backward_us": (float("inf"),)}, "backward_us: inf is not a time"),
        ({"p2p_us": float("nan")}, "p2p_us: nan is not a time"),
        ({"activation_bytes": 0}, "activation_bytes: 0 is out of range; give a whole number from 1 to"),
    ],
)
def test_costs_that_are_no_times_are_refused(arguments, message):
    given_costs = {"forward_us": (1.0,), "backward_us": (1.0,), "weight_us": (1.0,), "p2p_us": 0.0}
    with pytest.raises(LayoutError, match=re.escape(message)):
        PipelineCosts(**{**given_costs, **arguments})
