"""Stage partition in CP-SAT: the rows of `partition_formulation`, solved for the bottleneck, then for total time."""

from ortools.sat.python import cp_model

from solvers.partition import PartitionSolution, StagePartition, rescored
from solvers.partition_formulation import Formulation, Sum
from solvers.status import SolverError, Status

NAME = "cp-sat"

_STATUS = {  # MODEL_INVALID is absent on purpose: it is a bug of ours, and raises SolverError
    cp_model.OPTIMAL: Status.OPTIMAL,
    cp_model.FEASIBLE: Status.FEASIBLE,
    cp_model.INFEASIBLE: Status.INFEASIBLE,
    cp_model.UNKNOWN: Status.NO_SOLUTION,
}

TOTAL_TIME_SHARE = 0.2  # of the limit, for the second search: what it improves is a preference


def why_not(problem: StagePartition) -> str | None:
    """None: it takes every problem."""
    del problem
    return None


def solve(problem: StagePartition, *, time_limit_s: float, seed: int) -> PartitionSolution:
    """Least bottleneck within the limit; with choices, then the least total time within a part of it.

    The second search decides nothing about the status: it keeps layers from recomputing what the memory can hold.
    """
    form = Formulation(problem)
    model = cp_model.CpModel()
    variables = [model.new_int_var(least, most, name) for name, least, most in form.variables]

    def expression(row: Sum) -> cp_model.LinearExprT:
        numbers, factors = list(row.factors), list(row.factors.values())
        return cp_model.LinearExpr.weighted_sum([variables[number] for number in numbers], factors) + row.constant

    for row in form.rows:
        model.add(expression(row) <= 0)
    model.minimize(expression(form.bottleneck))
    solver = cp_model.CpSolver()
    solver.parameters.max_deterministic_time = time_limit_s  # about as long, and the same work every time
    solver.parameters.max_time_in_seconds = 10 * time_limit_s
    solver.parameters.random_seed = seed & 0x7FFFFFFF
    solver.parameters.num_workers = 1  # so that equal seeds give equal cuts
    solver.parameters.catch_sigint_signal = False
    status = _run(model, solver)
    bound = max(0, round(solver.best_objective_bound)) if status is not Status.INFEASIBLE else 0
    if not status.has_solution:
        return PartitionSolution(status, None, None, bound, NAME)
    values = [solver.value(variable) for variable in variables]
    if problem.choices:
        least_us = problem.bottleneck_us(*form.read(values))
        model.add(expression(form.bottleneck) <= least_us)
        for variable, value in zip(variables, values, strict=True):
            model.add_hint(variable, value)
        model.minimize(expression(form.total_us))
        solver.parameters.max_deterministic_time = TOTAL_TIME_SHARE * time_limit_s
        if _run(model, solver).has_solution:
            values = [solver.value(variable) for variable in variables]
    cuts, choices = form.read(values)
    return rescored(problem, cuts, status, bound, NAME, choices)


def _run(model: cp_model.CpModel, solver: cp_model.CpSolver) -> Status:
    code = solver.solve(model)
    if code not in _STATUS:
        raise SolverError(f"CP-SAT calls the partition model {solver.status_name(code)}: {model.validate()}")
    return _STATUS[code]
