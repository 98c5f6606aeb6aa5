"""Right half of the pipeline: pure functions from a run folder's tables to joules per phase, kernel and gap."""
