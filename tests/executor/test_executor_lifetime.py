"""How pipelines begin and end: data ranks start alike, and nothing of gloo is left when a Pipeline has been closed."""

from pathlib import Path

import pytest
from worker_launch import found_by

WORKER = Path(__file__).with_name("lifetime_worker.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return found_by(WORKER, 2, tmp_path_factory.mktemp("lifetime"), may_warn=True, timeout_s=120)


@pytest.mark.parametrize("zero", ["zero 0", "zero 1"])
def test_data_ranks_that_were_seeded_apart_start_and_stay_alike(found, zero):
    first, second = (rank[zero] for rank in found)
    assert first["start"] == second["start"]
    assert first["end"] == second["end"]
    assert first["start"] != first["end"]


@pytest.mark.parametrize("zero", ["zero 0", "zero 1"])
def test_closing_ends_the_threads_of_gloo_while_names_of_pipeline_and_optimizer_stay(found, zero):
    for rank in found:
        assert rank[zero]["gloo threads before"]
        assert rank[zero]["gloo threads after"] == {}
        assert rank[zero]["peak"] > 0


def test_a_closed_pipeline_refuses_steps(found):
    for rank in found:
        assert "is closed" in rank["zero 0"]["step"]
        assert "is closed" in rank["zero 1"]["optimizer"]


def test_a_step_in_inference_mode_is_refused_instead_of_making_no_gradients(found):
    for rank in found:
        assert "inference_mode" in rank["zero 0"]["inference"]


def test_data_ranks_with_other_layers_are_refused_on_all_of_them(found):
    for rank in found:
        assert "data ranks 0 and 1 of pipeline rank 0 hold parameter" in rank["other layers"]
