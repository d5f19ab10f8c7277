"""What is loaded when: planning needs no torch, running needs no solver, help needs neither."""

import subprocess
import sys

import pytest

SOLVERS = ("ortools", "pulp")
TORCH = ("torch",)


def loaded_after(code, names):
    program = f"import sys\n{code}\nprint([n for n in {names!r} if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return result.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "module", ["planner", "planner.plans", "planner.cli", "profiles.catalog", "profiles.analytic", "solvers"]
)
def test_importing_it_loads_neither_torch_nor_a_solver(module):
    assert loaded_after(f"import {module}", SOLVERS + TORCH) == "[]"


def test_help_loads_neither_torch_nor_a_solver():
    code = "import sys; sys.argv = ['pipewright', 'plan', '--help']\nfrom planner.cli import main\n"
    code += "try:\n    main()\nexcept SystemExit:\n    pass"
    assert loaded_after(code, SOLVERS + TORCH) == "[]"


def test_planning_loads_no_torch():
    code = "import planner; planner.plan('llama-3.1-8b', '1x8xh100-sxm', global_batch_size=8, time_limit_s=1)"
    assert loaded_after(code, TORCH) == "[]"


@pytest.mark.parametrize("module", ["planner.executor", "planner.executor.launch", "planner.executor.train"])
def test_a_training_job_loads_no_solver(module):
    assert loaded_after(f"import {module}", (*SOLVERS, "solvers")) == "[]"
