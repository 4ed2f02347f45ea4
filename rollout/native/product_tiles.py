"""Tiles of the matrix products on a GPU, chosen so that a row's result does not depend on the other rows.

What a row's bits depend on follows from the weights' shape and dtype alone: into how many parts the inputs
are split, and the kind of the multiply instruction. Within a part, every instruction adds 16 inputs
(bfloat16) or one (float32) to the sum so far, in order, whatever the tile. How many tokens a tile has, and
which programs work on which parts, may follow the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

_PROGRAMS = 264  # programs that keep a large GPU busy: two for each multiprocessor of an H100
_OUTPUTS = 64  # outputs of a tile: from 64 on, Hopper's bfloat16 instructions are those of warp groups
_STEP = 128  # inputs that a part is a multiple of; all tiles' steps divide it
_MOST_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Tiles:
    """Says how a product of one weight shape is divided among programs.

    Attributes:
        outputs: Outputs of a tile.
        tokens: Tokens of a tile.
        step: Inputs that a program reads at a time.
        parts: Parts that the inputs are split into, whose sums are added in order.
        length: Inputs of a part.
        folded: Whether one program runs all parts and writes their sum; otherwise each writes its own.
        warps: Warps of a program.
        stages: Stages of its pipeline.
    """

    outputs: int
    tokens: int
    step: int
    parts: int
    length: int
    folded: bool
    warps: int
    stages: int

    @property
    def written(self) -> int:
        """The number of sums written for each output."""
        return 1 if self.folded else self.parts


def product_parts(outputs: int, inputs: int) -> int:
    """Returns into how many parts the inputs of a product are split."""
    return _ceil(inputs, _length(outputs, inputs))


def product_tiles(outputs: int, inputs: int, tokens: int, bytes_per_value: int) -> Tiles:
    """Returns the tiles of a product.

    Args:
        outputs: Number of outputs, of all layers of the input together.
        inputs: Number of inputs.
        tokens: Number of tokens.
        bytes_per_value: 2 for bfloat16, 4 for float32.
    """
    length = _length(outputs, inputs)
    block = 16
    while block < min(tokens, _MOST_TOKENS):
        block *= 2
    parts = _ceil(inputs, length)
    programs = _ceil(outputs, _OUTPUTS) * _ceil(tokens, block)
    tiles = Tiles(_OUTPUTS, block, _STEP, parts, length, 2 * programs > _PROGRAMS, warps=4, stages=3)
    return tiles if bytes_per_value == 2 else replace(tiles, step=32, stages=2)


def _length(outputs: int, inputs: int) -> int:
    """Returns the inputs of a part, such that the parts keep the GPU busy whatever the number of tokens."""
    wanted = max(_PROGRAMS // _ceil(outputs, _OUTPUTS), 1)
    return _ceil(_ceil(inputs, wanted), _STEP) * _STEP


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)
