"""Where things run: executors, distributed set-up, tracking, deployment files and the embedded sample data."""
