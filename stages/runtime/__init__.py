"""Where and how a stage computes: device, precision, child processes."""
