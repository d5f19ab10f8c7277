"""Abstract scheduling and partition problems, their bounds and backends. Integers only."""
