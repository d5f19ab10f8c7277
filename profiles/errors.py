"""What a user can run into, as one tree of exceptions.

PipewrightError
├── FileError            a file that cannot be read, is not JSON, or does not hold what it should
├── CatalogError         a name or shorthand that stands for nothing
├── ProfileError         a profile that lacks what was asked of it, or cannot be measured
└── (planner.errors)     LayoutError, ScheduleError, PlanError, ExecutionError

A caller's wrong argument stays a `ValueError`; a bug of ours stays whatever Python raises.
"""


class PipewrightError(Exception):
    """Root of everything a user can cause and can mend; its text says which object, which numbers, what to do."""

    exit_code = 2


class FileError(PipewrightError):
    """A file is missing, unreadable, not JSON, or breaks its schema."""


class CatalogError(PipewrightError):
    """A catalogue name or a cluster shorthand that stands for nothing."""


class ProfileError(PipewrightError):
    """A profile lacks a variant that was asked of it, or cannot be made."""
