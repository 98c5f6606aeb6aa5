"""The workload: which model, at which precision, with which weights and prompts."""
