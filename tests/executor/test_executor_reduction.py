"""Gradients are reduced over data ranks beside the tail of the pipeline, and come out the same to the last bit."""

from pathlib import Path

import pytest
from worker_launch import found_by

WORKER = Path(__file__).with_name("reduction_worker.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return found_by(WORKER, 4, tmp_path_factory.mktemp("reduction"), may_warn=True)


def test_gradients_of_two_steps_are_equal_to_the_bit_with_and_without_overlap(found):
    for rank, cases in enumerate(found):
        assert len(cases) == 7
        for name, case in cases.items():
            assert case["equal"], (rank, name)
            assert case["same on all data ranks"], (rank, name)
            assert case["held"] == [0, 0], (rank, name)


def test_a_parameter_frozen_after_a_step_keeps_the_gradient_of_that_step(found):
    assert "1.inner.bias" in found[0]["1f1b"]["names"]


def test_a_stage_is_reduced_as_soon_as_its_last_backward_has_run(found):
    for cases in found:
        for name, case in cases.items():
            closing: dict[int, int] = {}
            for n, (kind, stage, *_) in enumerate(case["events"]):
                if kind in ("W", "BW"):
                    closing[stage] = n
            reductions = {event[1]: event for event in case["events"] if event[0] == "reduce"}
            for stage, n in closing.items():
                _, _, _, start, end = reductions[stage]
                assert case["events"][n][4] <= start <= end, name
                later = [event for event in case["events"][n + 1 :] if event[0] in ("F", "R", "B", "W", "BW")]
                assert all(start <= event[3] for event in later), (name, "starts before what the rank still runs")


def test_the_first_rank_of_two_chunks_reduces_the_later_chunk_before_its_last_backward(found):
    events = found[0]["interleaved-1f1b"]["events"]
    last_backward = max(event[3] for event in events if event[0] == "BW")
    starts = {event[1]: event[3] for event in events if event[0] == "reduce"}
    assert starts[2] < last_backward < starts[0]
    assert None in starts  # what shows of them all


def test_data_ranks_start_their_reductions_in_one_order(found):
    def order(cases):
        return {
            name: [event[1] for event in sorted(case["events"], key=lambda event: event[3]) if event[0] == "reduce"]
            for name, case in cases.items()
        }

    assert order(found[0]) == order(found[1])
    assert order(found[2]) == order(found[3])
