"""Prefect, and only here: the flow over all stages and its one task; and the `musevl` command."""
