"""The Prefect flows over all stages, their single task, and the `musevl` command. Only this package imports Prefect."""
