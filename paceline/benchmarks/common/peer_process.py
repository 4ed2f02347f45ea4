"""Runs a peer in an environment of its own, which need not have Paceline."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.rl.errors import UserError

_TIMEOUT_SECONDS = 1800


@dataclass(frozen=True, slots=True)
class PeerProcess:
    """Says how a peer is run.

    Attributes:
        name: The peer's name, for errors.
        script: Its script in this folder; it takes the model, a workload and the file of the result.
        target: Target of the Makefile that sets up its environment.
    """

    name: str
    script: str
    target: str

    def run(
        self,
        python: Path | None,
        model: Path,
        workload: dict[str, Any],
        environment: Mapping[str, str] | None = None,
    ) -> Any:
        """Runs the script on a workload and returns the result that it writes.

        Args:
            python: Interpreter of the peer's environment.
            model: The policy, as the peer reads it.
            workload: See `paceline.benchmarks.common.vllm_peer`.
            environment: Variables to add to those of this process; None adds none.

        Raises:
            UserError: The peer failed; the message has its last line.
        """
        script = Path(__file__).with_name(self.script)
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / "workload.json", Path(folder) / "result.json"
            source.write_text(json.dumps(workload))
            self.output(python, [str(script), str(model), str(source), str(target)], environment)
            return json.loads(target.read_text())

    def output(
        self,
        python: Path | None,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """Returns what the peer's interpreter prints.

        Args:
            python: Interpreter of the peer's environment.
            arguments: Its arguments.
            environment: Variables to add to those of this process; None adds none.

        Raises:
            UserError: The peer failed; the message has its last line.
        """
        result = subprocess.run(
            [str(python), *arguments],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
            env={**os.environ, **(environment or {})},
        )
        if result.returncode != 0:
            lines = result.stderr.strip().splitlines() or ["no message"]
            raise UserError(
                f"{self.name} failed in {python}: {lines[-1]}; reinstall its environment with: "
                f"make {self.target}"
            )
        return result.stdout
