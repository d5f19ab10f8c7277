"""The planner's branch of the error tree drawn in `profiles.errors`."""

from profiles.errors import PipewrightError


class LayoutError(PipewrightError):
    """Degrees that cannot be laid on this model and this cluster."""


class InfeasibleError(LayoutError):
    """The question is well formed, and no layout or schedule answers it; `proven` if none can."""

    exit_code = 1

    def __init__(self, message: str, *, proven: bool = False) -> None:
        super().__init__(message)
        self.proven = proven


class ScheduleError(PipewrightError):
    """A schedule that cannot run; the text shows rank, step and action."""


class PlanError(PipewrightError):
    """A plan whose parts disagree with each other."""


class ExecutionError(PipewrightError):
    """A plan that does not match the processes, the model or the batch it is run with."""
