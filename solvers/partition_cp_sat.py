"""Stage partition in CP-SAT. y[l, s] says that layer l is on stage s or behind it."""

from ortools.sat.python import cp_model

from solvers.partition import PartitionSolution, StagePartition, rescored
from solvers.status import SolverError, Status

NAME = "cp-sat"

_STATUS = {  # MODEL_INVALID is absent on purpose: it is a bug of ours, and raises SolverError
    cp_model.OPTIMAL: Status.OPTIMAL,
    cp_model.FEASIBLE: Status.FEASIBLE,
    cp_model.INFEASIBLE: Status.INFEASIBLE,
    cp_model.UNKNOWN: Status.NO_SOLUTION,
}


def why_not(problem: StagePartition) -> str | None:
    """None: it takes every problem."""
    del problem
    return None


def solve(problem: StagePartition, *, time_limit_s: float, seed: int) -> PartitionSolution:
    """Least bottleneck within the limit."""
    layers, stages = range(problem.num_layers), range(problem.num_stages)
    model = cp_model.CpModel()
    y = [[model.new_bool_var(f"y{layer}.{stage}") for stage in stages] for layer in layers]
    for layer in layers:
        model.add(y[layer][0] == 1)
        for stage in stages[1:]:
            model.add_implication(y[layer][stage], y[layer][stage - 1])
            if layer == 0:
                model.add(y[0][stage] == 0)  # the first layer is on the first stage
            else:
                model.add_implication(y[layer - 1][stage], y[layer][stage])  # layers stay in order
                model.add_implication(y[layer][stage], y[layer - 1][stage - 1])  # and skip no stage
    model.add(y[-1][-1] == 1)
    bottleneck = model.new_int_var(max(problem.times_us), sum(problem.times_us), "bottleneck_us")
    for rank in range(problem.num_ranks):
        temporary = model.new_int_var(0, max(problem.temporaries), f"temporary{rank}_bytes")
        load: list[cp_model.LinearExprT] = []
        used: list[cp_model.LinearExprT] = [temporary]
        for stage in (s for s in stages if problem.placement[s] == rank):
            sizes = problem.layer_bytes(stage)
            for layer in layers:
                here = y[layer][stage] - (y[layer][stage + 1] if stage + 1 < problem.num_stages else 0)
                load.append(problem.times_us[layer] * here)
                used.append(sizes[layer] * here)
                if problem.temporaries[layer]:
                    model.add(temporary >= problem.temporaries[layer] * here)
        model.add(sum(load) <= bottleneck)
        if problem.capacity_bytes is not None:
            model.add(sum(used) <= problem.capacity_bytes[rank])
    model.minimize(bottleneck)
    solver = cp_model.CpSolver()
    solver.parameters.max_deterministic_time = time_limit_s  # about as long, and the same work every time
    solver.parameters.max_time_in_seconds = 10 * time_limit_s
    solver.parameters.random_seed = seed & 0x7FFFFFFF
    solver.parameters.num_workers = 1  # so that equal seeds give equal cuts
    solver.parameters.catch_sigint_signal = False
    code = solver.solve(model)
    if code not in _STATUS:
        raise SolverError(f"CP-SAT calls the partition model {solver.status_name(code)}: {model.validate()}")
    status = _STATUS[code]
    bound = max(0, round(solver.best_objective_bound)) if status is not Status.INFEASIBLE else 0
    if not status.has_solution:
        return PartitionSolution(status, None, None, bound, NAME)
    cuts = [sum(1 - solver.value(y[layer][stage]) for layer in layers) for stage in stages[1:]]
    return rescored(problem, cuts, status, bound, NAME)
