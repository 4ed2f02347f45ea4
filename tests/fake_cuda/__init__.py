"""A pretended CUDA device: the engine runs on a CPU, with real numbers, as if on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from paceline.rollout.native import triton_kernels
from tests.fake_cuda.cuda import Cuda
from tests.fake_cuda.device import CudaTensor, DeviceMixError, FakeDevice, IllegalCaptureError, Wait
from tests.fake_cuda.guard import install_guard
from tests.fake_cuda.kernels import Programs

__all__ = ["Cuda", "DeviceMixError", "FakeDevice", "IllegalCaptureError", "Wait", "fake_cuda", "to_cuda"]


@contextlib.contextmanager
def fake_cuda(memory: int = 80 << 30, count: int = 1) -> Iterator[Cuda]:
    """Pretends, within a context, that there are CUDA devices.

    Forwards only: autograd knows no such device. Streams run at once, so that races stay unseen, and a Triton
    program is a stand-in that computes the same.

    Args:
        memory: Bytes of each device.
        count: Number of devices.
    """
    install_guard()
    mode = FakeDevice()
    cuda = Cuda(mode, memory, count)
    with contextlib.ExitStack() as stack:
        for name, value in cuda.replacements().items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for module in ("programs", "product_programs", "draw_programs"):
            stack.enter_context(mock.patch.object(triton_kernels, module, Programs(mode)))
        # tensor(…, device=…) copies from the host through the mode
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        FakeDevice.current = mode
        stack.callback(setattr, FakeDevice, "current", None)
        stack.enter_context(mode)
        yield cuda


def to_cuda(module: nn.Module, device: str = "cuda:0") -> nn.Module:
    """Moves a module's parameters and buffers to the pretended device, in place."""
    moved: dict[int, torch.Tensor] = {}
    target = torch.device(device)
    with _disable_current_modes():
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, x in tensors.items():
                    if x is not None and id(x) not in moved:
                        there = CudaTensor(x.detach().clone(), target)
                        moved[id(x)] = (
                            nn.Parameter(there, x.requires_grad) if isinstance(x, nn.Parameter) else there
                        )
                    if x is not None:
                        tensors[name] = moved[id(x)]
    return module
