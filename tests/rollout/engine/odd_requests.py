"""Requests as a caller's mistakes make them, for tests and the campaign of faults."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from paceline.rollout import FinishReason, Request, Rollout, RolloutStats, SamplingParams


class Broken:
    """An object whose every method fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __hash__(self) -> int:
        raise RuntimeError("no hash")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no eq")

    def __len__(self) -> int:
        raise RuntimeError("no len")

    def __iter__(self) -> Any:
        raise RuntimeError("no iter")

    def __index__(self) -> int:
        raise RuntimeError("no index")


NUMBERS: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        "1",
        "",
        b"1",
        0,
        1,
        -1,
        2,
        1.5,
        2.0,
        2.5,
        1e-42,
        1e308,
        math.nan,
        math.inf,
        -math.inf,
        2j,
    ),
    *(
        2**31,
        2**62,
        2**63,
        2**64 + 5,
        -(2**63),
        -(2**70),
        10**400,
        Fraction(1, 2),
        [1],
        (1,),
        {},
        object,
        Broken(),
    ),
    *(
        np.int64(3),
        np.uint64(2**63 + 1),
        np.float32(0.5),
        np.float64(math.nan),
        np.bool_(True),
        np.array(2),
        np.array([2]),
    ),
    *(torch.tensor(2), torch.tensor(0.5), torch.tensor(True), torch.tensor([1]), torch.tensor(math.nan)),
)
GROUPS: tuple[Any, ...] = (
    [1],
    {},
    {1},
    np.array([1]),
    Broken(),
    ([],),
    math.nan,
    1.5,
    b"x",
    torch.tensor(1),
    "other",
    -1,
)
PROMPTS: tuple[Any, ...] = (
    *(
        None,
        "",
        "abc",
        b"abc",
        5,
        1.5,
        {},
        {1: 2},
        Broken(),
        [],
        (),
        [[1, 2]],
        [None],
        ["1"],
        [1.5],
        [1.0],
        [math.nan],
        [True],
    ),
    *(
        [-1],
        [97],
        [2**63],
        [2**70],
        [1] * 10_000,
        [1, None],
        [Broken()],
        range(3),
        range(0),
        {3},
        iter([1]),
        np.array([1, 2]),
    ),
    *(
        np.array([[1]]),
        np.array([1.0]),
        np.array([]),
        np.array([1], dtype=np.uint8),
        torch.tensor([1, 2]),
        torch.tensor(1),
    ),
    *(
        torch.tensor([[1]]),
        torch.tensor([0.5]),
        [np.int64(1), torch.tensor(2)],
        (1, 2),
        np.array(["a"]),
        np.array([None]),
    ),
)
STOPS: tuple[Any, ...] = (
    *(
        None,
        5,
        "x",
        "",
        ("",),
        (None,),
        [1],
        (1.5,),
        ("x", 2),
        b"x",
        {"x": 1},
        Broken(),
        ("x" * 5000,),
        ("\ud800",),
        {"q"},
    ),
    *(
        tuple(f"stop {i}" for i in range(2000)),
        tuple(range(5000)),
        np.array([1, 2]),
        torch.tensor([3]),
        (-1,),
        (2**70,),
        (True,),
    ),
)
WHOLE: tuple[Any, ...] = (None, 5, "request", {}, [], Request, SamplingParams(), Broken(), math.nan)


def resumes(prompt: list[int], token: int) -> list[Any]:
    """Rollouts of ``prompt`` that were not returned like this by any engine."""
    request = Request(prompt)

    def paused(
        tokens: Any, logprobs: Any = (-1.0,), segments: Any = ((0, 1),), stats: Any = None, **rest: Any
    ) -> Rollout:
        stats = RolloutStats() if stats is None else stats
        return Rollout(
            rest.pop("request", request), tokens, logprobs, FinishReason.PAUSED, stats, segments, **rest
        )

    return [
        *(5, "x", {}, Broken(), Rollout(request, [1], [-1.0], FinishReason.STOP, RolloutStats())),
        *(
            paused([10**6]),
            paused([-1]),
            paused(["x"]),
            paused(None),
            paused([token], [-1.0, -2.0]),
            paused([token], None),
        ),
        *(
            paused([token], [math.nan]),
            paused([token], ["x"]),
            paused([token], segments=[(0, 2)]),
            paused([token], segments=[5]),
        ),
        *(paused([token], stats=5), paused([token], entropies=[1.0, 2.0]), paused([token], request=None)),
        *(paused([token] * 500, [-1.0] * 500, [(0, 500)]), paused([token], request=Request([9, 9]))),
    ]


def odd_request(rng: random.Random) -> Any:
    """A request that is wrong in one place, or only looks so; ValueError where `SamplingParams` refuses it at
    once.
    """
    prompt = [rng.randrange(1, 97) for _ in range(rng.randrange(1, 6))]
    good: dict[str, Any] = {"max_tokens": rng.randrange(1, 9)}
    places: list[Callable[[], Any]] = [
        lambda: rng.choice(WHOLE),
        lambda: Request(rng.choice(PROMPTS), SamplingParams(**good)),
        lambda: Request(prompt, rng.choice(NUMBERS)),
        lambda: Request(prompt, SamplingParams(**good), seed=rng.choice(NUMBERS)),
        lambda: Request(prompt, SamplingParams(**good), group=rng.choice(GROUPS)),
        lambda: Request(prompt, SamplingParams(**good), resume=rng.choice(resumes(prompt, prompt[0]))),
        lambda: Request(prompt, SamplingParams(**{**good, "max_tokens": rng.choice(NUMBERS)})),
        lambda: Request(prompt, SamplingParams(**good, temperature=rng.choice(NUMBERS))),
        lambda: Request(prompt, SamplingParams(**good, top_k=rng.choice(NUMBERS))),
        lambda: Request(prompt, SamplingParams(**good, top_p=rng.choice(NUMBERS))),
        lambda: Request(prompt, SamplingParams(**good, stop_token_ids=rng.choice(STOPS))),
        lambda: Request(prompt, SamplingParams(**good, stop_strings=rng.choice(STOPS))),
    ]
    return rng.choice(places)()
