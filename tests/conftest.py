"""Lets tests run on every core with one thread each, because processes that spin on each other's cores crawl.

Tests ask no hub: without a network, a recipe's check would wait for its retries, which take minutes where no
policy is cached yet.
"""

import os
import shutil

# all are read when libraries are imported, so they come first
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if shutil.which("nvidia-smi") is None:  # without a GPU, Triton's kernels run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

# A drafter that fails and layers that cannot be fused are left out with a warning, which tests must not
# hide. pyproject.toml cannot name the warnings: they would be imported before the variables above are set.
_ERRORS = (
    "paceline.rollout.engine.speculation.DrafterWarning",
    "paceline.rollout.model.view_check.UnfusedWarning",
)


def pytest_configure(config):
    for warning in _ERRORS:
        config.addinivalue_line("filterwarnings", f"error::{warning}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Undoes what a test before has set: a trainer takes its share of the cores."""
    torch.set_num_threads(1)
