"""Random numbers made on a GPU are those of the host, bit for bit."""

import numpy as np
import torch

from paceline.rollout.counter_rng import Stream, step_uniforms, step_uniforms_on_device
from tests.fake_cuda import fake_cuda


def test_numbers_made_on_a_gpu_are_the_hosts():
    seeds = np.array([0, 1, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15], dtype=np.uint64)
    roots = np.array([1, 17, 32000, 2**20, 2**31])
    with fake_cuda():
        on_device = [torch.from_numpy(x).cuda() for x in (seeds.view(np.int64), roots)]
        for stream in Stream:
            for first, count in ((0, 3), (1000, 2)):
                found = step_uniforms_on_device(*on_device, first, count, stream).cpu()
                assert torch.equal(found, step_uniforms(seeds, roots, first, count, stream))
