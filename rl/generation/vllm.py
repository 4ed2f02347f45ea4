"""Lets vLLM decode the trainer's rollouts and sends it new weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from paceline.drafter_trainer.storage.checkpoint import save_drafter
from paceline.rl.config.run import RunConfig
from paceline.rl.errors import UserError
from paceline.rl.sharding.gathering import in_buckets
from paceline.rollout import Request, Rollout
from paceline.rollout.backends import ServedBackend
from paceline.rollout.backends.exchange import TOKEN, read_token
from paceline.rollout.drafters.eagle3_model import Eagle3Model

_SHARD_BYTES = 2 << 30  # bounds the memory that a shard takes while it is written


def as_long_as(rollout: Rollout) -> Request:
    """Returns the rollout's request, changed so that any completion has as many tokens as this one."""
    endless = replace(
        rollout.request.params, max_tokens=len(rollout.token_ids), stop_token_ids=(), stop_strings=()
    )
    return replace(rollout.request, params=endless)


class VllmRollouts:
    """Sends updated policy and drafter weights to vLLM. One instance per rank; every method is collective.

    Args:
        config: The recipe, with ``rollout.vllm``.
        source: Directory of the policy that the run starts from, which vLLM loads first.
        accelerator: The run's accelerator.

    Attributes:
        backend: The backend that decodes.

    Raises:
        UserError: when vLLM is not installed, a server does not answer, or several ranks share no server.
    """

    def __init__(self, config: RunConfig, source: Path, accelerator: Accelerator) -> None:
        assert config.rollout.vllm is not None
        self._config, self._accelerator = config, accelerator
        self._vllm = config.rollout.vllm
        self._exchange = Path(self._vllm.exchange or Path(config.out) / "exchange")
        self._version = 0
        self.backend = self._servers() if self._vllm.servers else self._in_process(source)

    def _servers(self) -> ServedBackend:
        from paceline.rollout.backends.vllm_server import VllmServers

        main = self._accelerator.is_main_process
        try:
            token = read_token(self._exchange)
        except (OSError, ValueError) as error:
            raise UserError(
                f"rollout.vllm.exchange: it holds no server's token ({error}); write the directory that the "
                f"servers were started with (paceline serve RUN --exchange {self._exchange}), or set {TOKEN}"
            ) from None
        try:
            servers = VllmServers(self._vllm.servers, self._config.rollout.max_slots, sends=main, token=token)
            comparable = self._config.measure.plain_every == 0 or servers.adaptive
        except ConnectionError as error:
            raise UserError(f"rollout.vllm.servers: {error}") from None
        if not comparable:
            raise UserError(
                "measure.plain_every needs the adaptive scheduler in all of rollout.vllm.servers: start them "
                "with paceline serve RUN, without --schedule and --api-server-count, or write "
                "measure.plain_every: 0"
            )
        return servers

    def _in_process(self, source: Path) -> ServedBackend:
        if self._accelerator.num_processes > 1:
            raise UserError(
                "rollout.vllm without servers works for one rank only: start servers with paceline serve and "
                "write their addresses in rollout.vllm.servers"
            )
        r, s = self._config.rollout, self._config.speculation
        fixed = s.strategy.partition(":")[2]
        drafts = "eagle3" in s.drafters and s.strategy != "plain"
        options = dict(self._vllm.options)
        if r.kv_memory_gb is not None:
            options["kv_cache_memory_bytes"] = int(r.kv_memory_gb * 1e9)
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # on a CPU it would take half the memory
        from paceline.rollout.backends.vllm_engine import VllmEngine

        try:
            return VllmEngine(
                source,
                dtype=r.dtype,
                max_slots=r.max_slots,
                max_context=r.max_context,
                drafter=Path(str(self._config.drafter.start)) if drafts else None,
                depth=int(fixed) if fixed else self._vllm.depth,
                adaptive=not fixed,
                seed=self._config.seed,
                options=options,
            )
        except ImportError as error:
            raise UserError(
                f"rollout.vllm needs vLLM in this environment ({error}): run make peers, or write "
                "rollout.vllm.servers"
            ) from None

    @torch.no_grad()
    def update_policy(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Sends whole policy weights to vLLM. Collective; the main rank writes and sends.

        Args:
            weights: Names and whole tensors. Every rank exhausts the iterator, because gathering is
                collective.

        Raises:
            UserError: for a full disk or a lost server.
        """
        self._version += 1
        shards = self._write_shards(weights)
        self._accelerator.wait_for_everyone()
        try:
            self.backend.update_policy(shards, self._version)
        except ConnectionError as error:
            raise UserError(f"rollout.vllm.servers: {error}") from None
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            for shard in shards:
                shard.unlink(missing_ok=True)

    def _write_shards(self, weights: Iterator[tuple[str, torch.Tensor]]) -> list[Path]:
        """Writes the weights as safetensors shards on the main rank.

        Other ranks exhaust the iterator too and return an empty list.
        """
        shards: list[Path] = []
        for bucket in in_buckets(self._cpu_weights(weights), _SHARD_BYTES):
            path = self._exchange / f"policy-{self._version}-{len(shards)}.safetensors"
            try:
                self._exchange.mkdir(parents=True, exist_ok=True)
                save_file(dict(bucket), path)
            except OSError as error:
                raise UserError(
                    f"{path}: new weights could not be written ({error}); free disk space, or write another "
                    "rollout.vllm.exchange"
                ) from None
            shards.append(path)
        return shards

    def _cpu_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields weights on the CPU in the engine's dtype, on the main rank only.

        Every rank must exhaust the iterator.
        """
        dtype = getattr(torch, self._config.rollout.dtype)
        for name, tensor in weights:
            if self._accelerator.is_main_process:
                yield name, tensor.to(device="cpu", dtype=dtype).clone(memory_format=torch.contiguous_format)

    def update_drafter(self, model: Eagle3Model) -> None:
        """Sends drafter weights to vLLM. Collective; the main rank writes and sends.

        Raises:
            UserError: for a full disk or a lost server.
        """
        path = self._exchange / "drafter"
        try:
            if self._accelerator.is_main_process:
                self._exchange.mkdir(parents=True, exist_ok=True)
                save_drafter(model, path)
            self._accelerator.wait_for_everyone()
            self.backend.update_drafter(path)
        except (OSError, RuntimeError) as error:
            raise UserError(f"rollout.vllm: the drafter could not be handed over ({error})") from None
        self._accelerator.wait_for_everyone()

    def close(self) -> None:
        """Stops using vLLM and removes an exchange directory of the run's own."""
        self.backend.close()
        if self._accelerator.is_main_process and self._vllm.exchange is None:
            shutil.rmtree(self._exchange, ignore_errors=True)
