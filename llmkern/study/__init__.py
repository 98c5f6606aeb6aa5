"""A study: a plan of many runs, the runs, and what all of them say together."""
