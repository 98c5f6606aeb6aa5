"""What the recorder changes: generations with and without it, taking turns, so that the host's moods meet both.

Only ranges are kept, as passes *bare* and *recorded*; what the recorder recorded is thrown away.
"""

from __future__ import annotations

import math
import time

from llmkern.record.rig import Rig
from llmkern.runfolder.vocabulary import BARE, RECORDED

# Six pairs give an interval, and so do three that take longer than LONG_S; eight decoded tokens are enough for a
# median.
PAIRS, LEAST_PAIRS, LONG_S = 6, 3, 8.0
NEW_TOKENS = 9
SLOW_TOKENS, SLOW_S = 6, 0.1
# Of a model that decodes them in less, more are compared: a millisecond of the host's is a third of eight such tokens.
LEAST_S = 0.3


def record_effect(rig: Rig) -> None:
    """Record pairs of generations, in the order bare, recorded, recorded, bare, ..."""
    note, new_tokens = rig.annotator, _enough_tokens(rig)
    with rig.device.recorder() as recorder, rig.stages.stage("Comparing", 2 * PAIRS) as advance:
        begin_s = time.monotonic()
        for pair in range(PAIRS):
            if pair >= LEAST_PAIRS and time.monotonic() - begin_s > LONG_S:
                break
            for name in (BARE, RECORDED) if pair % 2 == 0 else (RECORDED, BARE):
                if name == RECORDED:
                    recorder.start(host_calls=False)
                # The first launches after a switch are slower than those that follow.
                rig.generation(min(2, new_tokens))
                note.drain()
                with rig.pumped(name) as pump:
                    note.repeat = pair
                    rig.generation(new_tokens)
                    note.repeat = None
                    pump.check()
                recorder.stop()
                recorder.drain()
                advance()


def _enough_tokens(rig: Rig) -> int:
    """Return how many tokens a generation needs for its decode to be seen: NEW_TOKENS, more of a fast model.

    Of a slow one SLOW_TOKENS are as good.
    """
    most = rig.options.new_tokens
    plan = rig.writer.facts.plan
    token_s = plan.generate_s / most if plan is not None and plan.generate_s else None
    if token_s is None:
        return min(NEW_TOKENS, most)
    few = SLOW_TOKENS if token_s > SLOW_S else NEW_TOKENS
    return min(most, max(few, math.ceil(LEAST_S / max(token_s, 1e-6))))
