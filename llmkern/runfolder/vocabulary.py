"""Words that more than one room uses, spelled in one place."""

from __future__ import annotations

# The NVTX domain of llmkern's own ranges.
DOMAIN = "llmkern"

# Passes. BARE and RECORDED hold generations that took turns, without and with the recorder: what it changes is read
# from the two.
SELFTEST, WEIGH, CALLS, TIME, INSPECT, REPLAY = "selftest", "weigh", "calls", "time", "inspect", "replay"
BARE, RECORDED = "bare", "recorded"
# Requests that arrive at a server.
SERVE = "serve"
# Those with a timeline, in the order in which they are recorded.
TRACED = (CALLS, TIME)

# The index of what is not there: no operator, no token, no call.
NONE = -1

PREFILL, DECODE = "prefill", "decode"
PHASES = (PREFILL, DECODE)

# Categories of ranges.
PASS, WINDOW, GENERATE, PHASE, TOKEN, LAYER, IDLE, LOAD = (
    *("pass", "window", "generate", "phase", "token", "layer", "idle", "load"),
)
# A window of prefills of many batches of prompts, beside those of the batch that is generated for.
PROMPT_SET = "prompt set"

# Energy counters by the kind of device that they count.
NVML_COUNTER, RAPL_COUNTER = "nvml_total", "rapl_package"

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int4")
ENGINES = ("eager", "graph", "fused")
# Names for a precision with an engine of its own.
FUSED = {"int8-fused": "int8", "int4-fused": "int4"}
WEIGHTS = ("auto", "hub", "local", "random")

RECORDING, COMPLETE, FAILED, INTERRUPTED, KILLED = "recording", "complete", "failed", "interrupted", "killed"

# A change of the wall clock against the monotonic one that is a step, in ns, beyond what a clock that is being
# disciplined drifts (500 ppm).
STEP_NS, DRIFT = 1_000_000, 500e-6
