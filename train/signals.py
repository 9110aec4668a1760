"""SIGTERM and SIGINT ask for an orderly end: the step in progress is finished and saved first."""

import signal
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator

from vqvae2.distributed import all_reduce_sum


class StopSignals:
    """Notes stop signals while the block runs; a second Ctrl-C stops at once."""

    def __enter__(self) -> "StopSignals":
        self._received = 0
        self._before: dict[signal.Signals, Any] = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def received(self, accelerator: Accelerator) -> signal.Signals | None:
        """The signal that any process has received, known to all of them."""
        numbers = torch.zeros(accelerator.num_processes, dtype=torch.int64, device=accelerator.device)
        numbers[accelerator.process_index] = self._received
        number = int(all_reduce_sum(numbers).max())
        return signal.Signals(number) if number else None

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number
