"""What the recorder changes: generations with and without it, taking turns, so that the host's moods meet both.

Only ranges are kept, as passes *bare* and *recorded*; what the recorder recorded is thrown away.
"""

from __future__ import annotations

import time

from llmkern.record.rig import Rig
from llmkern.runfolder.vocabulary import BARE, RECORDED

# Six pairs give an interval, and so do five that take longer than LONG_S; eight decoded tokens are enough for a median.
PAIRS, LEAST_PAIRS, LONG_S = 6, 5, 8.0
NEW_TOKENS = 9


def record_effect(rig: Rig) -> None:
    """Record pairs of generations, in the order bare, recorded, recorded, bare, ..."""
    note, new_tokens = rig.annotator, min(NEW_TOKENS, rig.options.new_tokens)
    with rig.device.recorder() as recorder, rig.stages.stage("Comparing", 2 * PAIRS) as advance:
        begin_s = time.monotonic()
        for pair in range(PAIRS):
            if pair >= LEAST_PAIRS and time.monotonic() - begin_s > LONG_S:
                break
            for name in (BARE, RECORDED) if pair % 2 == 0 else (RECORDED, BARE):
                if name == RECORDED:
                    recorder.start(host_calls=False)
                # The first launches after a switch are slower than those that follow.
                rig.generation(1)
                note.drain()
                with rig.pumped(name) as pump:
                    note.repeat = pair
                    rig.generation(new_tokens)
                    note.repeat = None
                    pump.check()
                recorder.stop()
                recorder.drain()
                advance()
