"""The parts of torch.cuda that the engine calls, on the pretended device."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from tests.fake_cuda.device import FakeDevice, Recording, tensors_in


class Event:
    """A CUDA event; all work is done when it is recorded."""

    def __init__(self, **options: Any) -> None:
        self._at = 0.0

    def record(self, stream: Any = None) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        assert FakeDevice.current is not None
        FakeDevice.current.wait("Event.synchronize")

    def elapsed_time(self, other: Event) -> float:
        return (other._at - self._at) * 1e3


class Stream:
    """A stream of a device."""

    def __init__(self, device: Any = None, **options: Any) -> None:
        assert FakeDevice.current is not None
        given = FakeDevice.current.device if device is None else torch.device(device)
        self.device = given if given.index is not None else FakeDevice.current.device

    def wait_stream(self, other: Stream) -> None:
        pass

    def synchronize(self) -> None:
        assert FakeDevice.current is not None
        FakeDevice.current.wait("Stream.synchronize")


class Graph:
    """Runs the recorded operators on the recorded tensors, and no Python code, at each replay."""

    def __init__(self) -> None:
        self.recording: Recording | None = None

    def replay(self) -> None:
        mode = FakeDevice.current
        assert mode is not None and self.recording is not None
        mode.launches += 1
        with torch.no_grad(), _disable_current_modes():
            for func, args, kwargs, out in self.recording.operators:
                again = func(*args, **kwargs)
                for old, new in zip(tensors_in((out,)), tensors_in((again,)), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Cuda:
    """Replacements for functions and classes of torch.cuda.

    Args:
        mode: The pretended device.
        memory: Total bytes of the device.
        count: Number of devices.
    """

    def __init__(self, mode: FakeDevice, memory: int, count: int) -> None:
        self.mode, self.memory, self.count = mode, memory, count
        self.held = 0  # bytes that this process holds

    def replacements(self) -> dict[str, Any]:
        """Returns the attributes of torch.cuda to replace."""
        mode = self.mode
        return {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: self.count,
            "current_device": lambda: mode.device.index,
            "get_device_capability": lambda device=None: (9, 0),
            "set_device": self._exchange,
            "device": self._on_device,
            "synchronize": lambda *device: mode.wait("synchronize"),
            "empty_cache": lambda: None,
            "mem_get_info": lambda *device: (self.memory - self.held, self.memory),
            "memory_reserved": lambda *device: self.held,
            "is_bf16_supported": lambda *a, **k: True,
            "Event": Event,
            "Stream": Stream,
            "current_stream": lambda *device: Stream(*device),
            "stream": self._on_stream,
            "CUDAGraph": Graph,
            "graph": self._capture,
            "graph_pool_handle": lambda: (0, 0),
        }

    def _exchange(self, device: Any) -> torch.device:
        before, given = self.mode.device, torch.device("cuda", device) if isinstance(device, int) else device
        given = torch.device(given)
        self.mode.device = given if given.index is not None else before
        return before

    @contextlib.contextmanager
    def _on_device(self, device: Any) -> Iterator[None]:
        before = self._exchange(device)
        try:
            yield
        finally:
            self.mode.device = before

    @contextlib.contextmanager
    def _on_stream(self, stream: Stream) -> Iterator[None]:
        with self._on_device(stream.device):
            yield

    @contextlib.contextmanager
    def _capture(
        self, graph: Graph, pool: Any = None, stream: Stream | None = None, **options: Any
    ) -> Iterator[None]:
        assert self.mode.capturing is None, "a capture within a capture"
        graph.recording = self.mode.capturing = Recording((stream or Stream()).device)
        try:
            with self._on_device(graph.recording.device):
                yield
        finally:
            self.mode.capturing = None
