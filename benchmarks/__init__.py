"""Speed, measured as ratios within one run. Correctness is tested in tests/."""
