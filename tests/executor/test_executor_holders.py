"""Every family on real processes against plain torch; replicas and tied weights are one parameter everywhere."""

import tempfile
from pathlib import Path

import pytest
from executor_cases import make_plan
from worker_launch import found_by

from planner.executor.launch import run_plan
from planner.schedule.families import FAMILIES
from profiles.measure.models import model_spec_for

WORKER = Path(__file__).with_name("holders_worker.py")
TWICE = [name for name, family in FAMILIES.items() if family.num_replicas == 2]


def part_of(found: list[dict[str, dict]], name: str) -> list[dict[str, dict]]:
    return [cases[name] for cases in found]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return found_by(WORKER, 2, "two", tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return found_by(WORKER, 4, "four", tmp_path_factory.mktemp("four"))


def assert_as_in_one_process(found: list[dict[str, dict]], *, dp: int = 1) -> None:
    for rank, cases in enumerate(found):
        for name, case in cases.items():
            where = f"rank {rank}, {name}: {case}"
            if case["loss"] and dp == 1:
                assert case["loss"][0] == 0, where
            assert all(far < 1e-13 for far in case["loss"]), where  # after a step the last bits of weights may differ
            assert case["gradients"] < 1e-10, where
            assert case["norm"] < 1e-12, where
            assert case["parameters"] < 1e-10, where


def assert_one_everywhere(found: list[dict[str, dict]]) -> None:
    """Whoever holds a parameter has the same bits of it and its gradient; one rank of them counts it."""
    for name in found[0]:
        tied = "untied" not in name
        bits: dict[str, set[str]] = {}
        for cases in found:
            for parameter, its in cases[name]["bits"].items():
                bits.setdefault(parameter, set()).add(its)
        assert all(len(each) == 1 for each in bits.values()), name
        first, last = "0.weight", f"{max(int(p.partition('.')[0]) for p in bits)}.weight"
        assert (bits[first] == bits[last]) == tied, name
        counted = [parameter for cases in found for parameter in cases[name]["counted"]]
        assert len(counted) == len(set(counted)), name
        assert set(counted) == bits.keys() - ({last} if tied else set()), name


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_every_family_trains_as_one_process_does_whatever_its_stages_and_embeddings(ranks, request):
    """Stages even and uneven, embeddings tied and not."""
    found = part_of(request.getfixturevalue(ranks), "families")
    assert {name.split()[0] for name in found[0]} == set(FAMILIES)
    assert_as_in_one_process(found)
    assert_one_everywhere(found)
    for name in found[0]:
        reporting = [rank for rank, cases in enumerate(found) if cases[name]["loss"]]
        if name.split()[0] in TWICE:
            assert reporting == [0, len(found) - 1], name


def test_replicas_need_no_tags(two):
    found = part_of(two, "without tags")
    assert len(found[0]) == 2 * len(TWICE)
    assert_as_in_one_process(found)


def test_two_replicas_and_two_data_ranks_train_as_one_process_does(four):
    found = part_of(four, "data parallel")
    assert len(found[0]) == 2 * len(TWICE)
    assert_as_in_one_process(found, dp=2)
    for name in found[0]:
        assert found[0][name]["bits"] == found[1][name]["bits"] == found[2][name]["bits"], name
        assert found[0][name]["counted"] == found[1][name]["counted"], name
        assert found[2][name]["counted"] == [], name


def test_what_holders_cannot_share_is_refused_on_every_rank(two):
    messages = {
        "circle": r"ScheduleError: rank 0, step 1: BW0.0 runs before F0.0",
        "other rank": "ScheduleError: rank 0, step 6: F1.3: microbatch 3 takes replica 0",
        "one replica": "ScheduleError: the schedule was to run two replicas, but it runs one",
        "no layer": "ExecutionError: ties name parameter weight of layer 9; the model has layers 0 to 3",
        "no parameter": "parameter height of layer 3, but that layer (Linear) has no such parameter",
        "shapes": "tied to each other differ: parameter weight of layer 0 is float64 [11, 6], parameter bias of layer",
        "shapes across ranks": "ranks 0 and 1 hold parameter weight of layer 0 together, but as float64 [11, 6] and",
        "post_validation": "post_validation is not for pipelines in which several ranks hold a parameter",
    }
    for found in part_of(two, "refusals"):
        assert found.keys() == messages.keys()
        for name, message in messages.items():
            assert message in found[name], name


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_family_with_every_number_of_microbatches_from_4_to_12(num_ranks, family, tmp_path):
    found = part_of(found_by(WORKER, num_ranks, family, tmp_path, timeout_s=900), "families")
    assert len(found[0]) >= 4
    assert_as_in_one_process(found)
    assert_one_everywhere(found)


@pytest.mark.parametrize(("family", "engine"), [("1f1b", "pipewright"), ("dualpipe", "pipewright"), ("1f1b", "torch")])
def test_a_bundled_model_with_tied_embeddings_runs_as_planned(family, engine, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    untied = model_spec_for("gpt2", num_layers=2, hidden_size=16, num_heads=2, vocab_size=31, sequence_length=8)
    plan = make_plan(
        FAMILIES[family].generate(2, 4),
        family=family,
        layers_per_stage=[2, 2],
        model=untied.model_copy(update={"tied_embeddings": True}),
        architecture="gpt2",
        sequence_length=8,
    )
    plan.save(tmp_path / "plan.json")
    steps = []
    report = run_plan(
        tmp_path / "plan.json", steps=3, device="cpu", engine=engine, check=True, on_progress=steps.append
    )
    assert report.exactness is not None
    assert report.exactness.worst_loss_relative_difference < 1e-10
    assert report.exactness.gradient_relative_difference < 1e-10
    assert [step.step for step in steps] == [0, 1, 2]
    assert report.losses[-1] < report.losses[0]
