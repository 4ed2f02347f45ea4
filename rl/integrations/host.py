"""Rollouts for a host: another trainer, which owns the policy and passes prompts."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from paceline.drafter_trainer.spot_trainer import LearnerReport
from paceline.drafter_trainer.storage.checkpoint import save_drafter
from paceline.drafter_trainer.storage.export import hub_id
from paceline.drafter_trainer.storage.model_card import DrafterFacts, drafter_card, license_of
from paceline.rl.checkpointing.checkpoint import Checkpoint
from paceline.rl.checkpointing.parts import restore_selector, write_speculation
from paceline.rl.config.parsing import parse
from paceline.rl.config.run import RunConfig
from paceline.rl.drafting.rank_drafter import RankDrafter
from paceline.rl.drafting.shared import SharedDrafter
from paceline.rl.errors import UserError
from paceline.rl.generation.worker import RolloutWorker
from paceline.rl.integrations.policy import HostPolicy
from paceline.rl.process.files import read_object, write_atomically
from paceline.rl.types import RankRollouts
from paceline.rl.validation.recipe import check_decoding
from paceline.rollout import FinishReason, Request, mean_acceptance_length

_SECTIONS = {"speculation", "drafter", "rollout", "measure"}
_ROLLOUT = {"max_context", "max_slots", "dtype", "kv_memory_gb", "stop_strings"}


def host_config(options: Mapping[str, Any], from_host: Mapping[str, Any], alone: bool) -> RunConfig:
    """Builds a recipe from the user's options and the host's settings.

    Args:
        options: Sections ``speculation``, ``drafter``, ``measure`` and ``rollout`` as in a recipe, with the
            keys that the host does not decide.
        from_host: The host's settings, as sections of a recipe.
        alone: Whether there is one rank only, which never idles. Unless the user names a schedule or a
            drafter, no drafter is then trained, and the suffix drafter drafts.

    Raises:
        UserError: for keys that are unknown, contradictory, or decided by the host.
    """
    for name in options:
        if name not in _SECTIONS:
            raise UserError(
                f"paceline: {name} is not a section here; write one of {', '.join(sorted(_SECTIONS))}"
            )
    for name in options.get("rollout", {}):
        if name not in _ROLLOUT:
            raise UserError(
                f"paceline: rollout.{name} is decided by the trainer; remove it; the keys here are "
                f"{', '.join(sorted(_ROLLOUT))}"
            )
    data = {name: dict(section) for name, section in options.items()}
    for name, section in from_host.items():
        data[name] = {**section, **data.get(name, {})} if isinstance(section, Mapping) else section
    drafter, speculation = data.setdefault("drafter", {}), data.setdefault("speculation", {})
    if alone and "schedule" not in drafter and "start" not in drafter:
        speculation.setdefault("drafters", ["suffix"])
    config = parse(RunConfig, data, where="paceline")
    if config.drafter.reward_weight:
        raise UserError(
            "paceline: drafter.reward_weight needs rewards, which the trainer computes after the rollouts: "
            "remove it"
        )
    check_decoding(config)
    return config


class HostedRollouts:
    """Decodes on one rank of a host, with the host's policy, and trains drafters.

    Every rank of the host has an instance and calls `refresh` before rollouts.

    Args:
        config: The recipe from `host_config`; drafters and traces are written to its ``out``.
        policy: The host's policy.
        tokenizer: The policy's tokenizer.
        accelerator: An accelerator on the host's process group.
        say: Receives one line for each problem.
    """

    def __init__(
        self,
        config: RunConfig,
        policy: HostPolicy,
        tokenizer: Any,
        accelerator: Accelerator,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.policy, self._accelerator, self._say = config, policy, accelerator, say
        self._decoded_with: Any = None
        self.worker = RolloutWorker(config, policy.decoded, tokenizer)
        self.engine = self.worker.engine
        local = RankDrafter(config, policy.decoded, self.worker, accelerator.process_index)
        self.drafter = SharedDrafter(config, local, accelerator, Path(config.out), say)
        self.drafter.start()
        self._calls = 0
        self._acceptance_length: float | None = None

    def refresh(self) -> bool:
        """Updates the engine's weights if the host's policy has changed since the last call.

        It reads all weights to find out. Collective where they are sharded.

        Returns:
            Whether the engine's weights were updated.
        """
        now = self.policy.fingerprint()
        changed = now is None or now != self._decoded_with
        if self.policy.is_partitioned:
            changed = any_rank(self._accelerator, changed)
        if changed:
            self._decoded_with = None  # until the update has succeeded
            self.policy.refresh()
            self.engine.refresh_weights()
            self._decoded_with = now
        return changed

    def rollouts(self, requests: Sequence[Request]) -> RankRollouts:
        """Decodes requests and returns their completions in the same order.

        Raises:
            UserError: when a request failed, with the first reason.
        """
        begin = time.perf_counter()
        rollouts = self.engine.generate(requests, self.drafter.beat)
        failed = next((r for r in rollouts if r.finish_reason is FinishReason.FAILED), None)
        if failed is not None:
            raise UserError(f"paceline: a rollout failed: {failed.error}")
        return RankRollouts(
            [],
            rollouts,
            time.perf_counter() - begin,
            list(self.engine.records),
            drawn=sum(len(r.token_ids) for r in rollouts),
        )

    def step(self, requests: Sequence[Request]) -> tuple[RankRollouts, LearnerReport]:
        """Decodes the requests of a training step and trains the drafter. Collective.

        A rank that has finished decoding trains the drafter while others decode; then all ranks share the
        trained weights.
        """
        self.drafter.coordinator.begin(self._calls)
        batch = self.rollouts(requests)
        report = self.drafter.train(batch, [0.0] * len(batch.rollouts), self._calls)
        self.drafter.wait(report)
        if self.config.measure.plain_every and (self._calls + 1) % self.config.measure.plain_every == 0:
            self.worker.measure_plain(batch)
            self._accelerator.wait_for_everyone()
        self.drafter.share(batch, report, self._calls)
        self._calls += 1
        if any(record.strategy.startswith("eagle3") for record in batch.records):
            self._acceptance_length = mean_acceptance_length(batch.rollouts)
        return batch, report

    def save(self, folder: Path) -> None:
        """Writes the drafter, its optimizer and the selector's state. Call it on the main rank.

        Raises:
            UserError: when they cannot be written; the host's own checkpoint is not touched.
        """
        drafter, optimizer = self.drafter.served()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_speculation(
                folder,
                drafter,
                optimizer,
                self.engine.speculation.selector.state(),
                self.drafter.ensemble(),
            )
            write_atomically(folder / "state.json", json.dumps({"calls": self._calls}))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{folder}: the drafter could not be written ({error}); free disk space"
            ) from None

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote. Collective.

        A drafter that cannot be read is reported in one line, and a new one is created.

        Raises:
            UserError: when the count of calls cannot be read.
        """
        try:
            self._calls = int(read_object(folder / "state.json")["calls"])
        except UserError as error:
            raise UserError(f"{error}; remove {folder} to begin with a new drafter") from None
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{folder / 'state.json'}: no count of calls ({error}); remove {folder} to begin anew"
            ) from None
        found = Checkpoint(folder, self._calls)
        self.drafter.resume(found)
        if (problem := restore_selector(found, self.engine.speculation.selector)) is not None:
            warnings.warn(problem, stacklevel=2)

    def take_over(self, earlier: HostedRollouts) -> None:
        """Continues with the drafter of an earlier instance of the same run. Collective."""
        earlier.drafter.finish()
        folder = Path(self.config.out) / "handover"
        if self._accelerator.is_main_process:
            earlier.save(folder)
        self._accelerator.wait_for_everyone()
        self.load(folder)
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)

    def finish(self) -> Path | None:
        """Exports the drafter into ``out`` after pending writes.

        Returns:
            Its directory on the main rank; None on others, or when there is no drafter to write.
        """
        self.drafter.finish()
        drafter, _ = self.drafter.served()
        if drafter is None or not self._accelerator.is_main_process:
            return None
        path = Path(self.config.out) / "drafter"
        name = str(self.drafter.local.policy_config.name_or_path)
        facts = DrafterFacts(
            target=name,
            base_model=hub_id(name, path),
            license=license_of(Path(name)),
            temperature=self.config.rollout.temperature,
            acceptance_length=self._acceptance_length,
        )
        try:
            save_drafter(drafter, path)
            (path / "README.md").write_text(
                drafter_card(facts, drafter.config.draft_vocab_size, path.name), encoding="utf-8"
            )
        except (OSError, SafetensorError) as error:  # the finished training must not fail
            self._say(f"{path}: the drafter could not be written ({error}); the last checkpoint has it")
            return None
        return path


def any_rank(accelerator: Accelerator, value: bool) -> bool:
    """Returns whether ``value`` is true on any rank. Collective."""
    count = torch.tensor([int(value)], device=accelerator.device)
    return bool(accelerator.reduce(count, "sum").item())


def step_report(batch: RankRollouts, report: LearnerReport) -> dict[str, float]:
    """Returns a rank's metrics of a step, by the names that hosts log."""
    tokens = sum(len(r.token_ids) for r in batch.rollouts)
    metrics = {
        "paceline/rollout_seconds": batch.seconds,
        "paceline/tokens_per_second": tokens / batch.seconds,
        "paceline/acceptance_length": mean_acceptance_length(batch.rollouts),
        "paceline/speculated_share": sum(r.strategy != "plain" for r in batch.records)
        / max(len(batch.records), 1),
        "paceline/drafter_seconds": report.seconds,
        "paceline/drafter_updates": float(report.updates),
        "paceline/drafter_held_back_seconds": report.held_back_seconds,
    }
    if report.slowdown is not None:
        metrics["paceline/drafter_slowdown"] = report.slowdown
    if batch.plain_seconds is not None:
        metrics["paceline/speedup_over_plain"] = batch.plain_seconds / batch.seconds
    return metrics
