"""Speed and memory as ratios to a named peer or limit, measured in one run; not part of the tests."""
