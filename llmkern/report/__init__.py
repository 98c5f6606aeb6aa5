"""Reports: pure functions from a run folder to what a person reads."""
