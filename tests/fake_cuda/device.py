"""Tensors that say they are on CUDA, and the dispatch mode that runs their operators on the CPU.

The mode keeps the rules of a GPU: tensors of two devices do not meet, results are fetched by waiting, and
what waits cannot be captured.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_PROJECT = tuple(str(Path(__file__).parents[2] / name) + "/" for name in ("paceline", "rollout", "rl"))
# operators whose result's shape or value the host needs
_WAITING = {
    _aten._local_scalar_dense.default, _aten.nonzero.default, _aten.equal.default, _aten.bincount.default,
    _aten.masked_select.default, _aten.unique_dim.default, _aten._unique2.default,
    _aten.unique_consecutive.default,
}  # fmt: skip
# operators that move data between devices, or say where it is
_TRANSFERS = {
    torch.ops.prim.device.default, _aten.lift_fresh.default, _aten.lift.default, _aten.is_pinned.default,
    _aten._pin_memory.default, _aten._to_copy.default, _aten.copy_.default, _aten._fused_sdp_choice.default,
}  # fmt: skip
_PRODUCTS = {_aten.mm.default, _aten.bmm.default, _aten.addmm.default, _aten.baddbmm.default}
_INDEXING = {
    _aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default,
    _aten._unsafe_index.Tensor,
}  # fmt: skip


class DeviceMixError(RuntimeError):
    """A CPU tensor met a CUDA tensor in one operator."""


class IllegalCaptureError(RuntimeError):
    """A capture waits for the GPU or reads memory of the host that may be gone at the replay."""


@dataclass(frozen=True)
class Wait:
    """One time that the host waited for the GPU.

    Attributes:
        what: The operation.
        place: Innermost line of the project.
        callers: Names of the project's functions on the stack.
    """

    what: str
    place: str
    callers: frozenset[str]


@dataclass
class Recording:
    """Operators on the tensors that they used, in the order in which a capture met them."""

    device: torch.device
    operators: list[tuple[Any, Any, Any, Any]] = field(default_factory=list)


class CudaTensor(torch.Tensor):
    """Says that it is on a CUDA device; ``host`` is the CPU tensor that it stands for."""

    host: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: torch.Tensor, device: torch.device, requires_grad: bool = False) -> CudaTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            layout=host.layout, device=device, requires_grad=requires_grad,
        )  # fmt: skip
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        mode = FakeDevice.current
        assert mode is not None, f"{func} on a pretended CUDA tensor outside fake_cuda()"
        with mode:
            return mode.execute(func, args, kwargs or {})

    def __repr__(self, **kwargs: Any) -> str:
        return f"CudaTensor({tuple(self.shape)}, {self.dtype})"  # values would be a wait

    def __deepcopy__(self, memo: dict[int, Any]) -> CudaTensor:
        copied = CudaTensor(self.host.detach().clone(), self.device, self.requires_grad)
        copied._is_param = getattr(self, "_is_param", False)
        memo[id(self)] = copied
        return copied

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: CudaTensor) -> None:
        torch.Tensor.data.__set__(self, value)
        self.host = value.host

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def tolist(self) -> Any:
        _current().wait("tolist")
        return self.host.tolist()

    def numpy(self, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda device type tensor to numpy: use Tensor.cpu() first")


def _current() -> FakeDevice:
    assert FakeDevice.current is not None
    return FakeDevice.current


def is_cuda(device: Any) -> bool:
    """Whether an operator's device argument names a CUDA device."""
    return device is not None and torch.device(device).type == "cuda"


def project_frames() -> Iterator[tuple[str, int, str]]:
    """Yields file, line and function of the project's frames on the stack, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_PROJECT):
            yield name, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back


class FakeDevice(TorchDispatchMode):
    """Runs the operators of pretended CUDA tensors on their CPU tensors and notes what a GPU would do.

    Attributes:
        waits: Times that the host waited.
        mixes: Operators in which devices were mixed, also those whose error the engine caught.
        launches: Number of kernels and replayed graphs.
        largest: Bytes and place of the largest tensor made since this was last reset.
        capturing: Capture in progress.
        device: The process's current device.
    """

    current: ClassVar[FakeDevice | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []
        self.mixes: list[str] = []
        self.launches = 0
        self.largest: tuple[int, str] = (0, "")
        self.capturing: Recording | None = None
        self.device = torch.device("cuda", 0)
        self._pinned: dict[int, torch.Tensor] = {}  # kept, so that no other tensor gets the address

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Returns False: nothing here is compiled, and guarding every operator takes a tenth of the time."""
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.execute(func, args, kwargs or {})

    def wait(self, what: str) -> None:
        """Notes that the host waits."""
        frames = list(project_frames())
        place = f"{Path(frames[0][0]).name}:{frames[0][1]}" if frames else "?"
        if self.capturing is not None:
            raise IllegalCaptureError(f"{what} at {place}: not permitted when stream is capturing")
        self.waits.append(Wait(what, place, frozenset(name for *_, name in frames)))

    def mix(self, func: Any, tensors: list[torch.Tensor]) -> DeviceMixError:
        """Notes that devices were mixed and returns the error to raise."""
        file, line, _ = next(project_frames(), ("?", 0, ""))
        found = ", ".join(f"{x.device} {tuple(x.shape)}" for x in tensors)
        self.mixes.append(f"{func} at {Path(file).name}:{line}: {found}")
        return DeviceMixError(f"expected all tensors to be on the same device: {self.mixes[-1]}")

    def execute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs one operator."""
        if func in _TRANSFERS:
            return self._transfer(func, args, kwargs)
        tensors = list(tensors_in(args))
        if kwargs:
            tensors += [x for x in kwargs.values() if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if isinstance(x, CudaTensor)]
        if not ours and not is_cuda(kwargs.get("device")):
            return func(*args, **kwargs)
        if kwargs.get("generator") is not None and kwargs["generator"].device.type == "cpu":
            raise self.mix(func, tensors)
        self._check_devices(func, args, tensors, ours)
        if func in _WAITING or (func is _aten.repeat_interleave.Tensor and kwargs.get("output_size") is None):
            self.wait(func.__name__)
        device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else ours[0].device
        if device.type == "cuda" and device.index is None:
            device = self.device
        inner = {name: torch.device("cpu") if name == "device" else to_host(x) for name, x in kwargs.items()}
        inner.pop("pin_memory", None)
        return self._run(func, to_host(args), inner, ours, device)

    def _run(self, func: Any, args: Any, kwargs: Any, ours: list[CudaTensor], device: torch.device) -> Any:
        """Runs an operator on CPU tensors and wraps its results."""
        if func in _PRODUCTS and torch.backends.cuda.matmul.fp32_precision == "tf32":
            args = tuple(map(_tf32, args))
        out = func(*args, **kwargs)
        given = {id(x.host): x for x in ours}
        if not func.is_view:
            self.launches += 1
            for x in tensors_in((out,)):
                if id(x) not in given and x.nbytes > self.largest[0]:
                    file, line, _ = next(project_frames(), ("?", 0, ""))
                    self.largest = x.nbytes, f"{Path(file).name}:{line}"
            self._record(func, args, kwargs, out, device)

        def wrap(x: Any) -> Any:
            if isinstance(x, (list, tuple)):
                return type(x)(map(wrap, x)) if type(x) in (list, tuple) else x
            if not isinstance(x, torch.Tensor) or device.type == "cpu":
                return x
            return given[id(x)] if id(x) in given else CudaTensor(x, device)

        return wrap(out)

    def _record(self, func: Any, args: Any, kwargs: Any, out: Any, device: torch.device) -> None:
        """Adds an operator to the capture, if it runs on the device whose stream is capturing."""
        if self.capturing is not None and device == self.capturing.device:
            self.capturing.operators.append((func, args, kwargs, out))

    def launch(self, kernel: Any, args: Any, kwargs: Any, ours: list[CudaTensor]) -> None:
        """Runs a kernel that writes into its arguments."""
        if any(x.device != self.device for x in ours):
            raise RuntimeError(f"{kernel}: illegal memory access, the current device is {self.device}")
        self.launches += 1
        kernel(*args, **kwargs)
        self._record(kernel, args, kwargs, None, self.device)

    def _check_devices(self, func: Any, args: Any, tensors: list, ours: list[CudaTensor]) -> None:
        """Raises an error if a CPU tensor meets a CUDA one, but for CUDA's own exceptions."""
        others = [x for x in tensors if not isinstance(x, CudaTensor) and x.dim() > 0]
        if func in _INDEXING and isinstance(args[0], CudaTensor):
            given = [x for x in args[1] if x is not None]
            if any(x.dtype in (torch.bool, torch.uint8) for x in given):
                self.wait("boolean index")
            uploaded = [x for x in given if not isinstance(x, CudaTensor)]
            if uploaded:
                self.wait("index from the host")
            others = [x for x in others if not any(x is y for y in uploaded)]
        if ours and (others or len({x.device for x in ours}) > 1):
            raise self.mix(func, tensors)

    def _transfer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operator of `_TRANSFERS`."""
        if func is torch.ops.prim.device.default:
            return args[0].device
        if func in (_aten.lift_fresh.default, _aten.lift.default):
            return args[0]
        if func is _aten.is_pinned.default:
            return not isinstance(args[0], CudaTensor) and args[0].data_ptr() in self._pinned
        if func is _aten._pin_memory.default:
            copied = args[0].clone()
            self._pinned[copied.data_ptr()] = copied
            return copied
        if func is _aten._to_copy.default:
            return self._copied(args[0], kwargs)
        if func is _aten._fused_sdp_choice.default:
            return 0
        return self._copy_into(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("non_blocking"))

    def _upload(self, source: torch.Tensor, non_blocking: Any) -> None:
        """Notes the copy of a CPU tensor to the device: from pageable memory the host waits."""
        if source.numel() and source.dim() and not (non_blocking and source.data_ptr() in self._pinned):
            self.wait("copy from pageable memory")

    def _copied(self, source: torch.Tensor, kwargs: Any) -> Any:
        """Runs ``to``."""
        wanted = kwargs.get("device")
        rest = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking", "pin_memory")}
        target = source.device if wanted is None else torch.device(wanted)
        if target.type == "cuda" and target.index is None:
            target = self.device
        if not isinstance(source, CudaTensor):
            if target.type == "cpu":
                return _aten._to_copy.default(source, **rest)
            self._upload(source, kwargs.get("non_blocking"))
            return CudaTensor(_aten._to_copy.default(source, **rest), target)
        if target.type == "cpu":
            self.wait("copy to the host")
            return _aten._to_copy.default(source.host, **rest)
        return self._run(_aten._to_copy.default, (source.host,), rest, [], target)

    def _copy_into(self, target: torch.Tensor, source: torch.Tensor, non_blocking: Any) -> Any:
        """Runs ``copy_``."""
        if isinstance(target, CudaTensor) == isinstance(source, CudaTensor):
            if isinstance(target, CudaTensor):
                self._run(_aten.copy_.default, (target.host, to_host(source)), {}, [target], target.device)
            else:
                _aten.copy_.default(target, source)
        elif isinstance(target, CudaTensor):
            self._upload(source, non_blocking)
            target.host.copy_(source)
        else:
            self.wait("copy to the host")
            target.copy_(to_host(source))
        return target


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors in an operator's arguments or results."""
    for x in values:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from tensors_in(x)


def _tf32(x: Any) -> Any:
    """Rounds float32 to the ten bits of TF32, as a GPU does in products where a trainer allows it."""
    if isinstance(x, torch.Tensor) and x.dtype == torch.float32:
        return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return x


def to_host(x: Any) -> Any:
    """Returns a pretended tensor's CPU tensor, and anything else itself.

    The value of a 0-dimensional CPU tensor is copied: a capture keeps it.
    """
    if isinstance(x, CudaTensor):
        return x.host
    if isinstance(x, torch.Tensor) and x.dim() == 0:
        return x.clone()
    if isinstance(x, (list, tuple)):
        return type(x)(map(to_host, x)) if type(x) in (list, tuple) else x
    return x
