"""CBC as PuLP runs it: the binary that PuLP 3 brings along, or else a `cbc` on the path, seeded and quiet."""

import pulp
from pulp.apis import coin_api

from solvers.status import SolverError


def cbc_command(*, time_limit_s: float, seed: int, threads: int = 1, warm_start: bool = False) -> pulp.COIN_CMD:
    """A PuLP solver; SolverError if there is no CBC.

    The binary is named by its path: the class PuLP 3 has for it is deprecated, and the extra that PuLP 4 will want
    instead installs 600 MB.
    """
    seeds = [f"randomCbcSeed {seed & 0x7FFFFFFF}", f"randomSeed {seed & 0x7FFFFFFF}"]
    for path in (coin_api.pulp_cbc_path, None):
        command = pulp.COIN_CMD(
            path=path, msg=False, timeLimit=time_limit_s, threads=threads, options=seeds, warmStart=warm_start
        )
        if command.available():
            return command
    raise SolverError("PuLP brings no CBC for this platform and none is on the path; install CBC")
