"""Stage partition in CBC, through PuLP: `partition_formulation`, least bottleneck, then least total time."""

import time

import pulp

from solvers.cbc_command import cbc_command
from solvers.partition import PartitionSolution, StagePartition, rescored
from solvers.partition_formulation import Formulation, Sum
from solvers.status import SolverError, Status

NAME = "cbc"

_STATUS = {  # (status, sol_status): a run stopped by its limit with an answer in hand has status 1, "Optimal", too
    (pulp.LpStatusOptimal, pulp.LpSolutionOptimal): Status.OPTIMAL,
    (pulp.LpStatusOptimal, pulp.LpSolutionIntegerFeasible): Status.FEASIBLE,
    (pulp.LpStatusInfeasible, pulp.LpSolutionInfeasible): Status.INFEASIBLE,
    (pulp.LpStatusInfeasible, pulp.LpSolutionNoSolutionFound): Status.INFEASIBLE,  # CBC's words: "Integer infeasible"
    (pulp.LpStatusNotSolved, pulp.LpSolutionNoSolutionFound): Status.NO_SOLUTION,
}


def why_not(problem: StagePartition) -> str | None:
    """None: it takes every problem."""
    del problem
    return None


def solve(problem: StagePartition, *, time_limit_s: float, seed: int) -> PartitionSolution:
    """Least bottleneck within the limit; with choices, then the least total time within what is left of it.

    CBC is inexact, so answers are rescored; the second search decides nothing about the status.
    """
    began = time.monotonic()
    form = Formulation(problem)
    status, values = _run(form, form.bottleneck, None, time_limit_s, seed)
    if values is None:
        return PartitionSolution(status, None, None, 0, NAME)
    left_s = time_limit_s - (time.monotonic() - began)
    if problem.choices and left_s > 0:
        most = form.bottleneck - Sum(constant=problem.bottleneck_us(*form.read(values)))
        _, better = _run(form, form.total_us, most, left_s, seed)
        if better is not None and problem.broken_rule(*form.read(better)) is None:
            values = better
    cuts, choices = form.read(values)
    return rescored(problem, cuts, status, 0, NAME, choices)


def _run(
    form: Formulation, objective: Sum, row: Sum | None, time_limit_s: float, seed: int
) -> tuple[Status, list[int] | None]:
    """Minimise the objective, with one more row if given; the status and the value of every variable."""
    model = pulp.LpProblem("stage_partition", pulp.LpMinimize)
    variables = [
        model.add_variable(name, lowBound=least, upBound=most, cat=pulp.LpInteger)
        for name, least, most in form.variables
    ]

    def expression(row: Sum) -> pulp.LpAffineExpression:
        return pulp.lpSum(factor * variables[number] for number, factor in row.factors.items())

    model += expression(objective)
    for one in form.rows if row is None else [*form.rows, row]:
        if one.factors:
            model += expression(one) <= -one.constant
        elif one.constant > 0:
            return Status.INFEASIBLE, None
    model.solve(cbc_command(time_limit_s=time_limit_s, seed=seed))
    status = _STATUS.get((model.status, model.sol_status))
    if status is None:
        raise SolverError(f"CBC ended the partition model with {model.status}, {model.sol_status}")
    if not status.has_solution:
        return status, None
    return status, [round(variable.value() or 0) for variable in variables]
