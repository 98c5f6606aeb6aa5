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
    """An operator to replay whole at each of *duties* (shares of the time), and its kernels called *alone* one by one.

    *launched* is what a call of it launches.
    """

    signature: str
    launched: tuple[Launch, ...] = ()
    duties: tuple[float, ...] = (0.9,)
    alone: tuple[str, ...] = ()
