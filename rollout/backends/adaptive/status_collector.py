"""Prometheus metrics of a depth control that runs in another process."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paceline.rollout.backends.adaptive.control_files import STATUS
from paceline.rollout.backends.adaptive.vllm_options import STATUS_VARIABLE


class StatusCollector:
    """A collector for ``prometheus_client`` that reads the status file whenever metrics are asked for.

    Without a readable status there are no metrics.
    """

    def describe(self) -> list[Any]:
        """Returns nothing, so that registering does not read the file."""
        return []

    def collect(self) -> Iterator[Any]:
        """Yields the metrics, whose names begin with ``paceline:``."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        try:
            status = json.loads((Path(os.environ[STATUS_VARIABLE]) / STATUS).read_text(encoding="utf-8"))
            gauges = [
                ("draft_depth", "Draft tokens of the latest step", status["draft_depth"]),
                ("acceptance_length", "Tokens of a step with a draft, lately", status["acceptance_length"]),
                ("speculation_on", "0 while the watchdog has it off", int(status["speculation_on"])),
            ]
            trips, steps = status["watchdog_trips"], status["steps_by_depth"]
        except (OSError, ValueError, KeyError, TypeError):
            return
        for name, text, value in gauges:
            yield GaugeMetricFamily(f"paceline:{name}", text, value=value)
        for name, text, label, counts in (
            ("watchdog_trips", "Verdicts of the watchdog", "reason", trips),
            ("steps", "Steps by the depth that they verified", "draft_depth", steps),
        ):
            family = CounterMetricFamily(f"paceline:{name}", text, labels=[label])
            for key, count in counts.items():
                family.add_metric([key], count)
            yield family
