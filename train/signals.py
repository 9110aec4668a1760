"""SIGTERM and SIGINT during training: finish the current step, save a checkpoint, then stop."""

import signal
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator

from vqvae2.distributed import all_reduce_sum


class StopSignals:
    """Records stop signals inside a `with` block. A second Ctrl-C interrupts immediately."""

    def __enter__(self) -> "StopSignals":
        self._received = 0
        self._previous: dict[signal.Signals, Any] = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def received(self, accelerator: Accelerator) -> signal.Signals | None:
        """Return the signal that any process has received. Every process must call this."""
        numbers = torch.zeros(accelerator.num_processes, dtype=torch.int64, device=accelerator.device)
        numbers[accelerator.process_index] = self._received
        number = int(all_reduce_sum(numbers).max())
        return signal.Signals(number) if number else None

    def _record(self, number: int, _: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number
