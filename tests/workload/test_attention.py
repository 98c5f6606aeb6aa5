"""Which ways of attention PyTorch may choose from while a run is recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmkern import session
from llmkern.progress import Stages
from llmkern.record.options import TraceOptions
from llmkern.runfolder import RunFolder
from llmkern.workload.engine import attention


def allowed() -> bool:
    return torch.backends.cuda.cudnn_sdp_enabled()


def test_cudnns_is_left_out_for_the_time_only() -> None:
    before = allowed()
    with attention(cudnn=True):
        assert allowed() == before
    with attention(cudnn=False):
        assert not allowed()
    assert allowed() == before
    with pytest.raises(ZeroDivisionError), attention(cudnn=False):
        raise ZeroDivisionError
    assert allowed() == before
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        # What its user switched off is not switched on.
        with attention(cudnn=True):
            assert not allowed()
        assert not allowed()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize("cudnn", [True, False])
def test_a_run_is_recorded_with_what_was_asked_for_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cudnn: bool
) -> None:
    seen = []
    weigh = session.weigh
    monkeypatch.setattr(session, "weigh", lambda rig, plan: (seen.append(allowed()), weigh(rig, plan)))
    small = {"prompt_tokens": 8, "new_tokens": 4, "warmup": 1, "repeats": 1, "unweighed_window_s": 0.01}
    options = TraceOptions(
        "qwen-tiny", device="cpu", weigh_only=True, cudnn_attention=cudnn, out=tmp_path / "run", **small
    )
    session.trace(options, Stages(quiet=True))
    assert seen == [cudnn and allowed()]
    assert RunFolder(tmp_path / "run").facts.options.cudnn_attention == cudnn
