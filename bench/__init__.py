"""Measurements behind every figure in the README: each module writes one file under bench/results/."""
