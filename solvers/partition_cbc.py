"""Stage partition in CBC, through PuLP. y[l, s] says that layer l is on stage s or behind it."""

import pulp

from solvers.cbc_command import cbc_command
from solvers.partition import PartitionSolution, StagePartition, rescored
from solvers.status import SolverError, Status

NAME = "cbc"

_STATUS = {  # (status, sol_status): a run stopped by its limit with an answer in hand has status 1, "Optimal", too
    (pulp.LpStatusOptimal, pulp.LpSolutionOptimal): Status.OPTIMAL,
    (pulp.LpStatusOptimal, pulp.LpSolutionIntegerFeasible): Status.FEASIBLE,
    (pulp.LpStatusInfeasible, pulp.LpSolutionInfeasible): Status.INFEASIBLE,
    (pulp.LpStatusNotSolved, pulp.LpSolutionNoSolutionFound): Status.NO_SOLUTION,
}


def why_not(problem: StagePartition) -> str | None:
    """None: it takes every problem."""
    del problem
    return None


def solve(problem: StagePartition, *, time_limit_s: float, seed: int) -> PartitionSolution:
    """Least bottleneck within the limit. Sizes are scaled to shares of the capacity inside, so answers are rescored."""
    layers, stages = range(problem.num_layers), range(problem.num_stages)
    model = pulp.LpProblem("stage_partition", pulp.LpMinimize)
    y = [[model.add_variable(f"y{layer}_{stage}", cat=pulp.LpBinary) for stage in stages] for layer in layers]
    bottleneck = model.add_variable("bottleneck_us", lowBound=max(problem.times_us), cat=pulp.LpInteger)
    model += bottleneck
    for layer in layers:
        model += y[layer][0] == 1
        for stage in stages[1:]:
            model += y[layer][stage] <= y[layer][stage - 1]
            if layer == 0:
                model += y[0][stage] == 0  # the first layer is on the first stage
            else:
                model += y[layer - 1][stage] <= y[layer][stage]  # layers stay in order
                model += y[layer][stage] <= y[layer - 1][stage - 1]  # and skip no stage
    model += y[-1][-1] == 1
    for rank in range(problem.num_ranks):
        temporary = model.add_variable(f"temporary{rank}_bytes", lowBound=0)
        load, used = [], [temporary]
        for stage in (s for s in stages if problem.placement[s] == rank):
            sizes = problem.layer_bytes(stage)
            for layer in layers:
                here = y[layer][stage] - (y[layer][stage + 1] if stage + 1 < problem.num_stages else 0)
                load.append(problem.times_us[layer] * here)
                used.append(sizes[layer] * here)
                if problem.temporaries[layer]:
                    model += temporary >= problem.temporaries[layer] * here
        model += pulp.lpSum(load) <= bottleneck
        if problem.capacity_bytes is not None:
            model += pulp.lpSum(used) <= problem.capacity_bytes[rank]
    model.solve(cbc_command(time_limit_s=time_limit_s, seed=seed))
    status = _STATUS.get((model.status, model.sol_status))
    if status is None:
        raise SolverError(f"CBC ended the partition model with {model.status}, {model.sol_status}")
    if not status.has_solution:
        return PartitionSolution(status, None, None, 0, NAME)
    cuts = [sum(round(1 - y[layer][stage].value()) for layer in layers) for stage in stages[1:]]
    return rescored(problem, cuts, status, 0, NAME)
