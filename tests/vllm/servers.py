"""Starts vLLM's servers for tests and stops them."""

import os
import signal
import subprocess
import time
import urllib.request
from contextlib import contextmanager

from tests.support import ROOT


def environment_of_server(**variables):
    """This process's environment, with our plug-in and no others, and ``variables``."""
    fixed = {"VLLM_PLUGINS": "paceline", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": str(ROOT)}
    fixed["VLLM_LOGGING_LEVEL"] = "INFO"  # importing TRL sets another
    return {**os.environ, **fixed, **variables}


def wait_until_healthy(url, process, log):
    """Returns once the server answers; fails with the end of its log if it ends or takes five minutes."""
    for _ in range(300):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


@contextmanager
def serving(command, port, log, environment):
    """A server on localhost that answers; stopped as an operator stops it."""
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}", process, log)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
