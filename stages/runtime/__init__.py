"""The execution environment of stages: device, precision, child processes, logging, progress, seeds."""
