"""Tests run on every core, one thread each: two processes that both spin on all cores are far slower than one."""

import torch

torch.set_num_threads(1)
