"""A candidate kernel beside its peers: is it right, how fast with cold weights, what does a call cost in joules.

A candidate runs in a process of its own (worker.py), so that one that crashes or hangs takes nothing with it; what
it did until then is kept. evaluation.py makes the answer of it, report/ renders that.
"""
