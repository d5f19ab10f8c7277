"""Schedules: actions and their text, families that generate them, validation, simulation."""
