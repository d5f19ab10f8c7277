"""Choice programs in CP-SAT: a Boolean per option, exactly one of them per choice."""

from math import ceil

from ortools.sat.python import cp_model

from solvers.placement import ChoiceProgram, ChoiceResult
from solvers.status import SolverError, Status

NAME = "cp-sat"

_STATUS = {  # MODEL_INVALID is absent on purpose: it is a bug of ours, and raises SolverError
    cp_model.OPTIMAL: Status.OPTIMAL,
    cp_model.FEASIBLE: Status.FEASIBLE,
    cp_model.INFEASIBLE: Status.INFEASIBLE,
    cp_model.UNKNOWN: Status.NO_SOLUTION,
}


def solve(program: ChoiceProgram, *, time_limit_s: float, seed: int) -> ChoiceResult:
    """The cheapest choices within the limit."""
    model = cp_model.CpModel()
    x = [[model.new_bool_var("") for _ in options] for options in program.costs]
    for options in x:
        model.add_exactly_one(options)
    for terms, total in program.equations:
        variables = [x[choice][option] for choice, option, _ in terms]
        model.add(cp_model.LinearExpr.weighted_sum(variables, [factor for *_, factor in terms]) == total)
    flat = [variable for options in x for variable in options]
    model.minimize(cp_model.LinearExpr.weighted_sum(flat, [cost for options in program.costs for cost in options]))
    for options, hinted in zip(x, program.hint or (), strict=False):
        for option, variable in enumerate(options):
            model.add_hint(variable, option == hinted)
    solver = cp_model.CpSolver()
    solver.parameters.max_deterministic_time = time_limit_s  # about as long, and the same work every time
    solver.parameters.max_time_in_seconds = 10 * time_limit_s
    solver.parameters.random_seed = seed & 0x7FFFFFFF
    solver.parameters.num_workers = 1  # so that equal seeds give equal choices
    solver.parameters.catch_sigint_signal = False
    code = solver.solve(model)
    if code not in _STATUS:
        raise SolverError(f"CP-SAT calls the placement model {solver.status_name(code)}: {model.validate()}")
    status = _STATUS[code]
    if status is Status.INFEASIBLE:
        return ChoiceResult(status, None, 0)
    bound = max(program.trivial_bound, ceil(solver.best_objective_bound - 1e-6))
    if not status.has_solution:
        return ChoiceResult(status, None, bound)
    chosen = tuple(next(j for j, variable in enumerate(options) if solver.boolean_value(variable)) for options in x)
    return ChoiceResult(status, chosen, bound)
