"""Configures a vLLM that someone else starts, by the environment variable ``PACELINE_VLLM``.

Trainers such as verl and TRL start vLLM themselves and have few options for it. vLLM's plug-in of this
package is loaded before vLLM's configuration is made, and fills in what the program has left open.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from paceline.rollout.backends.adaptive.draft_schedule import draft_depths, listing_schedule
from paceline.rollout.backends.adaptive.status_collector import StatusCollector
from paceline.rollout.backends.adaptive.vllm_options import (
    ADAPTIVE_METHODS,
    ADAPTIVE_SCHEDULER,
    STATUS_VARIABLE,
    VARIABLE,
    VllmOptions,
    options_from_environment,
)
from paceline.rollout.backends.vllm_version import require_our_release

_OUR_CLASSES = "paceline."  # how the path of a drafter of ours begins
_SCHEDULE = "num_speculative_tokens_per_batch_size"


def install() -> None:
    """Makes vLLM's arguments read the variable whenever they become a configuration.

    Nothing is done in processes that make no configuration, such as vLLM's workers. A second call does
    nothing.
    """
    module = sys.modules.get("vllm.engine.arg_utils")  # importing it here would close a circle within vLLM
    if module is None or hasattr(module.EngineArgs.create_engine_config, "reads_paceline"):
        return
    original = module.EngineArgs.create_engine_config

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        configure(self)
        return original(self, *args, **kwargs)

    create_engine_config.reads_paceline = True  # type: ignore[attr-defined]
    module.EngineArgs.create_engine_config = create_engine_config


def configure(arguments: Any) -> None:
    """Fills in what vLLM's arguments leave open; what the program or the command line says stays.

    Args:
        arguments: vLLM's ``EngineArgs``; changed in place.

    Raises:
        ValueError: The variable cannot be read; the message is one line and names the key.
        RuntimeError: Something of ours is asked for in another release of vLLM; likewise.
    """
    options = options_from_environment()
    for key in _asking(arguments, options):
        require_our_release(key)
    if options is not None:
        _fill_in(arguments, options)
    adaptive = arguments.scheduler_cls == ADAPTIVE_SCHEDULER
    if adaptive or options is not None:
        _keep_drafter(arguments)
    if adaptive:
        _name_depths(arguments)
        os.environ[STATUS_VARIABLE] = _status_directory()  # the engine core's process inherits it
        _register_collector()


def _asking(arguments: Any, options: VllmOptions | None) -> Iterator[str]:
    """Yields the keys by which the environment or the program asks for something of this package."""
    if options is not None:
        yield VARIABLE
    if arguments.scheduler_cls == ADAPTIVE_SCHEDULER:
        yield "scheduler_cls"
    if str(_speculative(arguments).get("model")).startswith(_OUR_CLASSES):
        yield "speculative_config"


def _fill_in(arguments: Any, options: VllmOptions) -> None:
    speculative = _speculative(arguments)
    if not speculative and options.speculative is not None:
        arguments.speculative_config = dict(options.speculative)
        speculative = _speculative(arguments)
    if not speculative:
        return
    method = speculative.get("method")
    if (
        options.adaptive
        and arguments.scheduler_cls is None
        and (method is None or method in ADAPTIVE_METHODS)
    ):
        arguments.scheduler_cls = ADAPTIVE_SCHEDULER


def _keep_drafter(arguments: Any) -> None:
    """Keeps the drafter's weights in sleep: a trainer that wakes vLLM sends the policy's only."""
    sleeps = arguments.enable_sleep_mode and not arguments.sleep_preserve_parameter_names
    if sleeps and _speculative(arguments):
        arguments.sleep_preserve_parameter_names = ["draft.*"]


def _speculative(arguments: Any) -> dict[str, Any]:
    """Returns what the arguments say about speculation; empty if nothing is to be drafted."""
    given = {key.replace("-", "_"): value for key, value in (arguments.speculative_config or {}).items()}
    named = {
        "method": arguments.spec_method,
        "model": arguments.spec_model,
        "num_speculative_tokens": arguments.spec_tokens,
    }
    return given | {key: value for key, value in named.items() if value is not None}


def _name_depths(arguments: Any) -> None:
    """Adds a schedule that names all depths unless there is one: without, vLLM pads drafts to one depth."""
    speculative = _speculative(arguments)
    most = speculative.get("num_speculative_tokens")
    if speculative.get(_SCHEDULE) is None and isinstance(most, int) and most > 0:
        schedule = listing_schedule(draft_depths(str(speculative.get("method")), most))
        arguments.speculative_config = {**(arguments.speculative_config or {}), _SCHEDULE: schedule}


@functools.cache
def _status_directory() -> str:
    """Returns a new directory for the status; once in a process, so that no two servers share it."""
    directory = tempfile.mkdtemp(prefix="paceline-vllm-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


@functools.cache
def _register_collector() -> None:
    """Adds the metrics to those that vLLM's server exposes; once in a process."""
    from prometheus_client import REGISTRY

    REGISTRY.register(StatusCollector())
