"""Pages hold what slots do: the same lines at the same places, in the memory of the tokens held."""

import numpy as np
import pytest
import torch

from paceline.rollout.model.kv_cache import CacheShape
from paceline.rollout.model.paged_cache import PAGE, PagedCache

CPU = torch.device("cpu")


def shape_of(slots: int, capacity: int, taps: int = 3) -> CacheShape:
    return CacheShape(2, 2, 4, slots, capacity, taps, torch.float32)


def filled(cache: PagedCache, slot: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    lines, taps = torch.randn(2, 2, 2, length, 4), torch.randn(length, 3)
    cache.write_slot(slot, lines, taps)
    return lines, taps


def holds(cache: PagedCache, slot: int, contents: tuple[torch.Tensor, torch.Tensor]) -> None:
    lines, taps = contents
    found = cache.read_slot(slot, len(taps))
    assert torch.equal(found[0], lines)
    assert torch.equal(found[1], taps)


def test_sequences_keep_their_lines_while_others_grow_and_leave():
    cache = PagedCache(shape_of(3, 200), CPU)
    cache.reserve([40, 70, 5], active=0)
    contents = [filled(cache, slot, length) for slot, length in enumerate((40, 70, 5))]
    cache.reserve([130, 70, 90], active=3)
    for slot in range(3):
        holds(cache, slot, contents[slot])
    cache.vacate(0, 2, 5)  # the last one fills the hole
    holds(cache, 0, contents[2])
    holds(cache, 1, contents[1])
    cache.reserve([100, 70, 200], active=2)
    filled(cache, 2, 200)
    holds(cache, 0, contents[2])
    holds(cache, 1, contents[1])


def test_a_prompt_is_copied_to_its_samples():
    cache = PagedCache(shape_of(3, 100), CPU)
    cache.reserve([50, 60, 60], active=0)
    contents = filled(cache, 0, 50)
    cache.copy_slot(0, [1, 2], 50)
    for slot in range(3):
        holds(cache, slot, contents)


def test_accepted_nodes_become_consecutive():
    cache = PagedCache(shape_of(2, 100), CPU)
    cache.reserve([60, 90], active=0)
    (lines, taps), other = filled(cache, 0, 60), filled(cache, 1, 90)
    cache.keep_paths([30, 80], [[0, 3, 7], []])
    moved = [*range(31), 33, 37, *range(33, 60)]
    holds(cache, 0, (lines[:, :, :, moved], taps[moved]))
    holds(cache, 1, other)


def test_features_are_read_by_slot_and_place():
    cache = PagedCache(shape_of(2, 100), CPU)
    cache.reserve([60, 90], active=0)
    (_, first), (_, second) = filled(cache, 0, 60), filled(cache, 1, 90)
    found = cache.taps_at(torch.tensor([1, 0, 1]), torch.tensor([88, 33, 0]))
    assert torch.equal(found, torch.stack([second[88], first[33], second[0]]))


def test_memory_follows_the_tokens_held():
    """Pages hold at most 1.1 times the tokens where 8 % of the lengths reach the cap of 16,384."""
    drawn = np.random.default_rng(0).lognormal(np.log(3000), 1.2, 256)
    lengths = drawn.clip(32, 16384).astype(int).tolist()
    assert 0.05 < np.mean(np.array(lengths) == 16384) < 0.12
    cache = PagedCache(CacheShape(1, 1, 1, 256, 16384, 0, torch.float32), CPU)
    cache.reserve(lengths, active=0)
    assert sum(lengths) <= cache.pages_held * PAGE <= 1.1 * sum(lengths)
    rectangle = len(lengths) * max(lengths)
    assert rectangle > 2.5 * sum(lengths)


def test_what_does_not_fit_is_not_admitted():
    cache = PagedCache(shape_of(8, 320), CPU, limit_bytes=12 * PAGE * shape_of(8, 320).token_bytes)
    assert cache.fits([320, 32, 32])
    assert not cache.fits([320, 33, 32])
    assert not cache.fits([1] * 9)
    with pytest.raises(MemoryError, match="free pages"):
        cache.reserve([320, 33, 33], active=0)


def test_pages_are_given_back():
    cache = PagedCache(shape_of(4, 100), CPU)
    for _ in range(5):
        cache.reserve([100, 50, 80, 20], active=0)
        cache.vacate(1, 3, 20)
        cache.vacate(3, 3, 0)
        cache.reserve([100, 20, 80], active=3)
    assert cache.pages_held == 4 + 1 + 3
