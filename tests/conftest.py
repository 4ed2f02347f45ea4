"""Tests run on every core, one thread each: two processes that both spin on all cores are far slower than
one.

They ask no hub: without a network, a recipe's check would wait for its retries, which take minutes where no
    policy is cached yet.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported, so it comes first

import torch

torch.set_num_threads(1)
