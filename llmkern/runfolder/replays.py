"""What is replayed: operators whole, and kernels of them alone. Decided from a timeline, done by a recording."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """A kernel as it is launched: its name, grid and block; these are 0 for a copy or a memset."""

    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


@dataclass(frozen=True)
class Wanted:
    """An operator to replay: *whole*, and one by one those called *alone* of the kernels that a call has *launched*."""

    signature: str
    launched: tuple[Launch, ...] = ()
    whole: bool = True
    alone: tuple[str, ...] = ()
