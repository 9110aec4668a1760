"""SIGTERM and SIGINT during training: finish the current step, save a checkpoint, then stop."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from accelerate import Accelerator
from torch import Tensor

from vqvae2.distributed import all_reduce_sum
from vqvae2.errors import Stopped


class StopSignals:
    """Records stop signals inside a `with` block. A second Ctrl-C interrupts immediately.

    Raises:
        Stopped: At the end of the block, if a signal arrived after the last call of `received`.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._received = 0
        self._exchanged: _HostCopy | None = None

    def __enter__(self) -> Self:
        self._previous: dict[signal.Signals, Any] = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._received and error is None:  # after the last step
            name = signal.Signals(self._received).name
            raise Stopped(f"stopped by {name}; run the same command again to resume", self._received)

    def received(self) -> signal.Signals | None:
        """Return the signal that any process has received. Every process must call this in every step.

        With several processes, a signal is returned one step late: by then, the result of the previous exchange has
        arrived while the device works on the next step.
        """
        number = self._received
        if self.accelerator.num_processes > 1:
            previous, self._exchanged = self._exchanged, self._exchange()
            number = previous.value() if previous else 0
        return signal.Signals(number) if number else None

    def _exchange(self) -> "_HostCopy":
        numbers = torch.zeros(self.accelerator.num_processes, dtype=torch.int64, device=self.accelerator.device)
        numbers[self.accelerator.process_index] = self._received
        return _HostCopy(all_reduce_sum(numbers).max())

    def _record(self, number: int, _: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number


class _HostCopy:
    """An asynchronous copy of an integer () to the host."""

    def __init__(self, number: Tensor) -> None:
        self._host, self._copied = number, None
        if number.device.type == "cuda":
            self._host = torch.empty((), dtype=number.dtype, pin_memory=True)
            self._host.copy_(number, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def value(self) -> int:
        """Wait for this copy, but not for later work of the device, and return the number."""
        if self._copied is not None:
            self._copied.synchronize()
        return int(self._host)
