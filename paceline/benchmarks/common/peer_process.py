"""Runs a peer in an environment of its own, which need not have Paceline."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.rl.errors import UserError

_TIMEOUT_SECONDS = 1800

Turns = Callable[[Any], Any]  # takes what to run, returns the result


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

    @contextmanager
    def turns(self, python: Path | None, model: Path, workload: dict[str, Any]) -> Iterator[Turns]:
        """Runs the script so that it waits for requests; it ends with the context.

        Yields:
            A function that takes what to run and returns the result.

        Raises:
            UserError: The peer failed; the message has its last line.
        """
        script = Path(__file__).with_name(self.script)
        with tempfile.TemporaryDirectory() as folder:
            source, log = Path(folder) / "workload.json", Path(folder) / "log"
            source.write_text(json.dumps(workload))
            arguments = [str(python), str(script), str(model), str(source), str(Path(folder) / "-"), "turns"]
            with (
                log.open("w") as errors,
                subprocess.Popen(
                    arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
                ) as process,
            ):
                assert process.stdin is not None
                assert process.stdout is not None
                requests, answers = process.stdin, process.stdout

                def ask(request: Any) -> Any:
                    print(json.dumps(request), file=requests, flush=True)
                    for line in answers:
                        if line.startswith("PASS "):
                            return json.loads(line.removeprefix("PASS "))
                    raise self._failed(python, log.read_text())

                try:
                    yield ask
                finally:
                    process.terminate()

    def _failed(self, python: Path | None, errors: str) -> UserError:
        lines = errors.strip().splitlines() or ["no message"]
        return UserError(
            f"{self.name} failed in {python}: {lines[-1]}; reinstall its environment with: make {self.target}"
        )

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
            raise self._failed(python, result.stderr)
        return result.stdout
