"""Runs a Plan under torchrun: `Pipeline` in a training script, `launch.run_plan` for the bundled models."""

from planner.executor.pipeline import Pipeline
from planner.executor.trace import RankTrace, StepTrace, Trace, TraceEvent
from planner.executor.transport import LostPeerError

__all__ = ["LostPeerError", "Pipeline", "RankTrace", "StepTrace", "Trace", "TraceEvent"]
