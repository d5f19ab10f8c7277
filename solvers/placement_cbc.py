"""Choice programs in CBC, through PuLP: a binary per option, one of them per choice."""

import pulp

from solvers.cbc_command import cbc_command
from solvers.placement import ChoiceProgram, ChoiceResult
from solvers.status import SolverError, Status

NAME = "cbc"

_STATUS = {  # (status, sol_status): a run stopped by its limit with an answer in hand has status 1, "Optimal", too
    (pulp.LpStatusOptimal, pulp.LpSolutionOptimal): Status.OPTIMAL,
    (pulp.LpStatusOptimal, pulp.LpSolutionIntegerFeasible): Status.FEASIBLE,
    (pulp.LpStatusInfeasible, pulp.LpSolutionInfeasible): Status.INFEASIBLE,
    (pulp.LpStatusNotSolved, pulp.LpSolutionNoSolutionFound): Status.NO_SOLUTION,
}


def solve(program: ChoiceProgram, *, time_limit_s: float, seed: int) -> ChoiceResult:
    """The cheapest choices within the limit; short of a proof the bound is the trivial one, as CBC tells none."""
    model = pulp.LpProblem("placement", pulp.LpMinimize)
    x = [
        [model.add_variable(f"x{choice}_{option}", cat=pulp.LpBinary) for option in range(len(options))]
        for choice, options in enumerate(program.costs)
    ]
    model += pulp.LpAffineExpression(
        [
            (variable, cost)
            for row, options in zip(x, program.costs, strict=True)
            for variable, cost in zip(row, options, strict=True)
        ]
    )
    for row in x:
        model += pulp.lpSum(row) == 1
    for terms, total in program.equations:
        if terms:
            model += pulp.lpSum(factor * x[choice][option] for choice, option, factor in terms) == total
        elif total:
            return ChoiceResult(Status.INFEASIBLE, None, 0)
    model.solve(cbc_command(time_limit_s=time_limit_s, seed=seed))
    status = _STATUS.get((model.status, model.sol_status))
    if status is None:
        raise SolverError(f"CBC ended the placement model with {model.status}, {model.sol_status}")
    if status is Status.INFEASIBLE:
        return ChoiceResult(status, None, 0)
    if not status.has_solution:
        return ChoiceResult(status, None, program.trivial_bound)
    values = [[variable.value() or 0.0 for variable in row] for row in x]
    chosen = tuple(row.index(max(row)) for row in values)
    return ChoiceResult(status, chosen, program.trivial_bound)
