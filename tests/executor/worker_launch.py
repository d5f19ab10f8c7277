"""How tests start their workers under torchrun, and get what every process wrote to found-RANK.json."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def torchrun(
    worker: Path,
    num_processes: int,
    *arguments: object,
    timeout_s: float = 200,
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    return subprocess.run(
        [*command, str(worker), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def found_by(
    worker: Path,
    num_processes: int,
    *arguments: object,
    may_warn: bool = False,
    timeout_s: float = 200,
    environment: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """The findings of every process; the last of `arguments` is the directory they are written to."""
    done = torchrun(worker, num_processes, *arguments, timeout_s=timeout_s, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert may_warn or "Warning" not in done.stderr, done.stderr
    directory = Path(str(arguments[-1]))
    return [json.loads((directory / f"found-{rank}.json").read_text()) for rank in range(num_processes)]
