"""A brute-force oracle for tiny pipeline problems: shares the problem's fields, and no code, with scoring and search.

Every complete order of every rank that respects what the rank itself can see (precedence among its own ops, memory,
limits in flight), combined over the ranks, timed by relaxing start times until nothing moves. By default F, R, B and
W of a stage run in microbatch order; `any_microbatch_order` drops that, which tests that nothing is lost by it.
"""

from itertools import pairwise, product


def optimum_us(problem, *, any_microbatch_order=False):
    """Least objective over all orders; None if no order fits."""
    per_rank = [
        list(_rank_orders(problem, rank, any_microbatch_order)) for rank in range(max(problem.rank_of_stage) + 1)
    ]
    best = None
    for order in product(*per_rank):
        limit = None if best is None else best - 1
        cost = _cost_us(problem, order, limit)
        if cost is not None:
            best = cost
    return best


def num_orders(problem):
    """How many combinations `optimum_us` would time."""
    total = 1
    for rank in range(max(problem.rank_of_stage) + 1):
        total *= sum(1 for _ in _rank_orders(problem, rank, False))
    return total


def order_cost_us(problem, order):
    """The objective of one complete order; None if it deadlocks."""
    return _cost_us(problem, [[tuple(op) for op in ops] for ops in order], None)


def _duration(problem, op):
    kind, s, j = op
    if kind == "R":
        return problem.recompute_us[s]
    if kind == "BW":
        return _of(problem.backward_us[s], j) + _of(problem.weight_us[s], j)
    return _of({"F": problem.forward_us, "B": problem.backward_us, "W": problem.weight_us}[kind][s], j)


def _of(value, j):
    """A stage's value for microbatch j: the same for all, or a tuple with one each."""
    return value[j] if isinstance(value, tuple) else value


def _needs(problem, op):
    """(op it waits for, delay) of an op, all of them."""
    kind, s, j = op
    last = len(problem.forward_us) - 1
    if kind == "F":
        return [(("F", s - 1, j), problem.transfer_us[s - 1])] if s else []
    if kind == "W":
        return [(("B", s, j), 0)]
    needs = [(("F", s, j), 0)]
    if kind == "R":
        return needs
    if _recomputes(problem, s):
        needs.append((("R", s, j), 0))
    if s < last:
        needs.append((("B" if problem.split[s + 1] else "BW", s + 1, j), problem.transfer_us[s]))
    return needs


def _recomputes(problem, s):
    return problem.recompute_us is not None and problem.recompute_us[s] != 0


def _rank_orders(problem, rank, any_microbatch_order):
    stages = [s for s, r in enumerate(problem.rank_of_stage) if r == rank]
    m = problem.num_microbatches
    ops = [
        (kind, s, j)
        for s in stages
        for kind in (["R"] if _recomputes(problem, s) else []) + (["F", "B", "W"] if problem.split[s] else ["F", "BW"])
        for j in range(m)
    ]
    before = {op: set() for op in ops}
    for op in ops:
        kind, s, j = op
        for other in ops:
            other_kind, t, k = other
            if other == op:
                continue
            if not any_microbatch_order and (other_kind, t) == (kind, s) and k < j:
                before[op].add(other)
            if k != j:
                continue
            if kind == "F":
                waits = other_kind == "F" and t < s
            elif kind == "W":
                waits = other_kind == "B" and t == s
            elif kind == "R":
                waits = other_kind == "F" and t <= s
            else:  # all forwards of the rank came first, its own R, and the backwards of the rank's later stages
                waits = other_kind == "F" or (other_kind == "R" and t == s) or (other_kind in ("B", "BW") and t > s)
            if waits:
                before[op].add(other)
    capacity = None if problem.capacity_bytes is None else problem.capacity_bytes[rank]

    if capacity is not None and problem.fixed_bytes is not None:
        capacity -= problem.fixed_bytes[rank]

    def crowded(done, s):
        if problem.max_in_flight is None:
            return False
        begun = [j for kind, t, j in done if kind == "F" and t == s]
        over = [j for kind, t, j in done if kind in ("B", "BW") and t == s]
        return len(begun) - len(over) >= problem.max_in_flight[s]

    def extend(done, held):
        if len(done) == len(ops):
            yield tuple(done)
            return
        for op in ops:
            if op in done or not before[op] <= set(done):
                continue
            kind, s, j = op
            size, kept = _of(problem.activation_bytes[s], j), _of(problem.weight_activation_bytes[s], j)
            if kind == "F" and crowded(done, s):
                continue
            if kind == "F":
                now = after = held + (problem.checkpoint_bytes[s] if _recomputes(problem, s) else size)
            elif kind == "R":
                now = after = held + size - problem.checkpoint_bytes[s]
            elif kind == "BW":
                now, after = held, held - size
            elif kind == "W":
                now, after = held, held - kept
            else:
                now = held + max(0, kept - size)
                after = held - size + kept
            if capacity is None or now <= capacity:
                yield from extend([*done, op], after)

    yield from extend([], 0)


def _cost_us(problem, order, limit):
    """Cost of an order, None if it deadlocks or costs more than the limit."""
    arcs = []  # (before, after, least distance between starts)
    for ops in order:
        for a, b in pairwise(ops):
            arcs.append((a, b, _duration(problem, a)))
        for op in ops:
            for needed, delay in _needs(problem, op):
                arcs.append((needed, op, _duration(problem, needed) + delay))
    asap = _relaxed(order, arcs)
    if asap is None:
        return None
    if problem.objective == "makespan":
        cost = max(asap[ops[-1]] + _duration(problem, ops[-1]) for ops in order)
        return cost if limit is None or cost <= limit else None
    cost = max(asap[ops[-1]] + _duration(problem, ops[-1]) - asap[ops[0]] for ops in order)
    if limit is not None and cost > limit:
        cost = limit + 1
    while cost > 1:
        closing = [(ops[-1], ops[0], _duration(problem, ops[-1]) - (cost - 1)) for ops in order]
        if _relaxed(order, arcs + closing) is None:
            break
        cost -= 1
    return cost if limit is None or cost <= limit else None


def _relaxed(order, arcs):
    """Earliest starts under all arcs; None if they go round in a circle."""
    start = {op: 0 for ops in order for op in ops}
    for _ in range(len(start) + 1):
        moved = False
        for a, b, distance in arcs:
            if start[a] + distance > start[b]:
                start[b] = start[a] + distance
                moved = True
        if not moved:
            return start
    return None
