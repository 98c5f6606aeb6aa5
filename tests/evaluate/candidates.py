"""What a user may bring: a good candidate, and those that do what they must not."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch


def good(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    wide = None if bias is None else bias.float()
    return torch.nn.functional.linear(x.float(), weight.dequantized(), wide).to(x.dtype)


def wrong_scale(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    y = good(x, weight, bias)
    y[:, 0] *= 2
    return y


def half_written(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    y = torch.empty((x.shape[0], weight.n), dtype=x.dtype, device=x.device)
    y[:, ::2] = good(x, weight, bias)[:, ::2]
    return y


def nan(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    y = good(x, weight, bias)
    y[0, 3] = float("nan")
    return y


def infinite(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    y = good(x, weight, bias)
    y[0, 3] = float("inf")
    return y


def wrong_shape(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    return good(x, weight, bias)[:, :-1]


def wrong_dtype(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    return good(x, weight, bias).float()


def nothing(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> None:
    return None


def changes_x(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    y = good(x, weight, bias)
    x.zero_()
    return y


def forgets_bias(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    return good(x, weight, None)


def no_tails(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    if weight.n % 64:
        raise ValueError("N must divide by 64")
    return good(x, weight, bias)


def raises(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    raise RuntimeError("the kernel cannot do that")


def crashes(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(60)
    return x


def hangs(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    time.sleep(600)
    return x


def _halved(weight: Any) -> Any:
    return weight.dequantized().to(torch.float32)


def prepared(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    wide = None if bias is None else bias.float()
    return torch.nn.functional.linear(x.float(), weight, wide).to(x.dtype)


prepared.prepare = _halved  # type: ignore[attr-defined]
only_int8 = type("Only", (), {"formats": ("int8",), "__call__": staticmethod(good)})()
number = 3
