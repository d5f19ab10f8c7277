"""What ZB-H1 and ZB-H2 share: some forwards, then B, a W that lags behind, and F in turn."""

from planner.schedule.actions import Action, Kind


def handcrafted(rank: int, num_microbatches: int, *, warm_up: int, weight_lag: int) -> tuple[Action, ...]:
    """The order of one rank: `warm_up` forwards; then B i, W i − `weight_lag`, the next F; then the W that are left."""
    order = [Action(Kind.F, rank, j) for j in range(warm_up)]
    for j in range(num_microbatches):
        order.append(Action(Kind.B, rank, j))
        if j >= weight_lag:
            order.append(Action(Kind.W, rank, j - weight_lag))
        if warm_up + j < num_microbatches:
            order.append(Action(Kind.F, rank, warm_up + j))
    first_left = max(0, num_microbatches - weight_lag)
    order += [Action(Kind.W, rank, j) for j in range(first_left, num_microbatches)]
    return tuple(order)
