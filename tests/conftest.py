"""Lets tests run on every core with one thread each, because processes that spin on each other's cores crawl.

Tests ask no hub: without a network, a recipe's check would wait for its retries, which take minutes where no
policy is cached yet.
"""

import os

# both are read when libraries are imported, so they come first
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Undoes what a test before has set: a trainer takes its share of the cores."""
    torch.set_num_threads(1)
