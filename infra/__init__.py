"""Execution and environment: executors, process groups, signals, allocator, deployment files and the sample data."""
