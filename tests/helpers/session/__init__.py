"""How a test run is put together: what is made once, which tests may start processes, what comes first."""
