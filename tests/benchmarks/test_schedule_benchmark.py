"""The pure parts of the schedule benchmark: its facts, its drawn instances, its enumeration, its marks."""

import json
from dataclasses import replace

import pytest
import schedule_tables
import schedules
from schedule_instances import FACTS, activation_sizes, even, least_cost_us, num_combinations, published, tiny, uneven
from schedule_tables import TABLES, Measured, Row, Settings, fitting_families, solved, wrong_with
from typer.testing import CliRunner

from solvers.pipeline import PipelineProblem
from solvers.registry import solve_pipeline
from solvers.status import Status


@pytest.mark.parametrize(("model", "ratio"), [("1.5b", 0.3664), ("6.2b", 0.4324)])
def test_memory_ratios_are_the_papers(model, ratio):
    held, kept = activation_sizes(model)
    assert round(kept / held, 4) == ratio


@pytest.mark.parametrize("setting", FACTS["paper"], ids=lambda s: f"{s['model']}-m{s['m']}")
def test_zb_h1_of_every_restated_setting_has_the_printed_zb_1p_rate(setting):
    """At one p·M_B the paper's ZB-1p is ZB-H1, in all six settings: a typing error in the facts would show."""
    problem = published(setting, memory=1)
    zb_h1 = next(family for family in fitting_families(problem) if family.name == "zb-h1")
    assert round(schedule_tables.rate_of(problem, zb_h1.cost_us), 4) == setting["zb_1p"]


def test_two_chunks_keep_the_work_of_a_rank_and_its_memory():
    one = even(4, 6, (7, 9, 5), 3, memory=1.5, held=4, kept=2)
    two = even(4, 6, (7, 9, 5), 3, memory=1.5, held=2, kept=1, placement="vee")
    assert one.work_us == two.work_us
    assert one.capacity_bytes == two.capacity_bytes == (24,) * 4
    assert two.transfer_us == (3, 3, 3, 0, 3, 3, 3)


def test_drawn_instances_are_what_the_benchmark_says():
    for seed in range(40):
        problem, words = uneven(seed)
        p, m = problem.num_ranks, problem.num_microbatches
        assert 4 <= p <= 16
        assert 2 * p <= m <= 4 * p
        assert f"p={p} m={m}" in words
        assert ("head" in words) == (seed % 4 == 3)
        last = p - 1 if "head" in words else p
        assert all(7_500 <= us <= 12_500 for us in problem.forward_us[:last])
        assert all(us <= 0.1 * 10_000 for us in problem.transfer_us)
        assert 0.49 * p * 5 <= problem.capacity_bytes[0] <= 2 * p * 5
        assert uneven(seed)[0] == problem


def one_rank(**changes):
    problem = PipelineProblem(
        forward_us=(2,),
        backward_us=(3,),
        weight_us=(1,),
        split=(True,),
        transfer_us=(),
        rank_of_stage=(0,),
        num_microbatches=2,
        activation_bytes=(2,),
        weight_activation_bytes=(1,),
    )
    return replace(problem, **changes)


def two_ranks(**changes):
    """F, B, W of 1 on both ranks, two microbatches, room for all of them and more unless `memory` says less."""
    return even(2, 2, (1, 1, 1), 0, memory=changes.pop("memory", 2), **changes)


def test_enumeration_is_right_where_the_head_can_check_it():
    assert least_cost_us(one_rank()) == 12  # one rank never waits
    # rank 0 has B0 three after its first F at best, and only two F to run until then; with three it never waits
    assert least_cost_us(two_ranks()) == 7
    assert least_cost_us(replace(two_ranks(), num_microbatches=3)) == 9
    # makespan: rank 1 starts at 1 and works 6
    assert least_cost_us(two_ranks(objective="makespan")) == 7
    # room for one microbatch: rank 0 runs F, waits for F and B of rank 1, runs B and W, twice
    assert least_cost_us(two_ranks(memory=0.5)) == 10
    assert num_combinations(one_rank()) == 5  # standard Young tableaux of two columns and three rows


def test_enumeration_refuses_what_cannot_fit():
    with pytest.raises(ValueError, match="empty"):
        least_cost_us(one_rank(capacity_bytes=(1,)))


@pytest.mark.parametrize("seed", range(12))
def test_enumeration_and_cp_sat_agree(seed):
    problem = tiny(seed)
    answer = solve_pipeline(problem, solver="cp-sat", time_limit_s=20, workers=1)
    assert answer.status is Status.OPTIMAL
    assert answer.objective_us == least_cost_us(problem)


def test_an_answer_that_is_not_what_it_says_is_found_out():
    problem = two_ranks()
    answer = solve_pipeline(problem, solver="list-scheduling", time_limit_s=5)
    assert wrong_with(problem, answer) == []
    lied = replace(answer, score=replace(answer.score, objective_us=answer.objective_us - 1))
    assert "simulated" in wrong_with(problem, lied)[0]
    assert "bound" in wrong_with(problem, replace(answer, lower_bound_us=99))[0]
    assert "more than there is" in wrong_with(replace(problem, capacity_bytes=(1, 1)), answer)[0]
    assert "no answer" in wrong_with(problem, replace(answer, order=None, score=None))[0]


def test_a_crash_of_a_solver_is_a_missed_cell(monkeypatch):
    def crash(*args, **kwargs):
        raise AssertionError("an F ahead of its upstream F")

    monkeypatch.setattr(schedule_tables, "solve_pipeline", crash)
    measured = solved(two_ranks(), Settings(time_limit_s=1))
    measured.wants_gap(0.01)
    assert measured.row({}).missed == ("crash: AssertionError: an F ahead of its upstream F",)


def test_rates_are_compared_as_they_are_printed():
    problem = even(2, 1, (1, 1, 1), 1, memory=2)  # F, a transfer, F and B, a transfer, B and W: 3 of 7 are work
    measured = Measured(problem, solve_pipeline(problem, solver="list-scheduling", time_limit_s=5))
    assert measured.rate == pytest.approx(4 / 7)
    measured.wants_rate(0.5714, "a table")
    assert measured.missed == []
    measured.wants_rate(0.5713, "a table")
    assert measured.missed == ["rate 0.5714 > 0.5713 of a table"]


def test_missed_cells_are_marked_in_lines_and_counted_in_summaries():
    table = TABLES["uneven"]
    good = Row({"seed": 1, "instance": "a", "gap": 0.002}, gap=0.002)
    bad = Row({"seed": 2, "instance": "b", "gap": 0.06}, gap=0.06, missed=("gap 6.00% > 5.0%",))
    assert "MISSED" not in schedules.line_of(table, good)
    assert "MISSED: gap 6.00% > 5.0%" in schedules.line_of(table, bad)
    summary = schedules.summary_of(table, [good, bad])
    assert "1 of 2 cells meet the target" in summary
    assert "worst 6.00% (2, b)" in summary
    assert "MISSED: median gap 3.10% > 1.0%" in summary


def test_the_command_prints_tables_and_writes_them(tmp_path):
    app = schedules.typer.Typer()
    app.command()(schedules.main)
    path = tmp_path / "result.json"
    result = CliRunner().invoke(app, ["--quick", "--only", "exact", "--workers", "1", "--json", str(path)])
    assert result.exit_code == 0, result.output
    assert "exact: 1 of 1 cells meet the target" in result.output
    document = json.loads(path.read_text())
    assert document["interrupted"] is False
    assert [len(row["details"]) for row in document["tables"][0]["rows"]] == [8]


def test_an_unknown_table_is_refused():
    app = schedules.typer.Typer()
    app.command()(schedules.main)
    result = CliRunner().invoke(app, ["--only", "papers"])
    assert result.exit_code == 2
    assert "papers" in result.output
