"""Temporary alias while the rooms are built; removed before release."""
from planner.plans import *  # noqa: F403
