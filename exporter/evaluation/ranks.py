"""One process or several under torchrun: who takes which images, and waiting for each other. Nothing else is exchanged: results
meet in the output folder."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from stm.errors import ConfigError, StmError

T = TypeVar("T")
_LONGEST_WAIT = datetime.timedelta(days=7)  # the fastest rank waits for the slowest


class RankError(StmError, RuntimeError):
    """Another process of this run failed."""


@dataclass(frozen=True)
class Ranks:
    """This process's place, from the environment that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK)."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        """Raises:
        ConfigError: values that are not numbers or do not fit each other.
        """
        try:
            size = int(os.environ.get("WORLD_SIZE", "1"))
            rank = int(os.environ.get("RANK", "0")) if size > 1 else 0
            local_rank = int(os.environ.get("LOCAL_RANK", "0")) if size > 1 else 0
            local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if size > 1 else 1
        except ValueError as error:
            raise ConfigError(f"RANK, WORLD_SIZE, LOCAL_RANK are set by torchrun and hold numbers: {error}") from None
        if not 0 <= rank < size:
            raise ConfigError(f"RANK is {rank}, WORLD_SIZE {size}; start with torchrun, or unset both")
        return cls(rank, size, local_rank, local_size)

    def part(self, items: Sequence[T]) -> list[T]:
        """Every size-th item from the rank-th on: parts are disjoint and whole, none is padded."""
        return list(items[self.rank :: self.size])

    def join(self) -> None:
        """Meet the other processes (gloo: no GPU is needed to wait)."""
        if self.size == 1:
            return
        import torch.distributed as dist

        if not dist.is_initialized():
            try:
                dist.init_process_group("gloo", timeout=_LONGEST_WAIT)
            except (ValueError, RuntimeError) as error:
                raise RankError(
                    f"rank {self.rank} of {self.size} cannot meet the others ({str(error).splitlines()[0][:200]}); use torchrun"
                ) from None

    def barrier(self) -> None:
        """Wait until all are here.

        Raises:
            RankError: one of them is gone.
        """
        if self.size == 1:
            return
        import torch.distributed as dist

        try:
            dist.barrier()
        except RuntimeError:
            raise RankError(f"rank {self.rank} of {self.size}: another process of this run failed; its message says why") from None

    def leave(self) -> None:
        if self.size == 1:
            return
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
