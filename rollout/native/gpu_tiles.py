"""How a GPU's programs divide products and attention, so that no row's result depends on the other rows.

In a product, what a row's bits depend on follows from the weights' shape and dtype alone: into how many parts
the inputs are split, and the kind of the multiply instruction. Within a part, every instruction adds 16
inputs (bfloat16) or one (float32) to the sum so far, in order, whatever the tile. All else follows the number
of tokens, too. The numbers are those that were fastest on an H100, for models of 1.5B and 8B parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

ATTENTION_PARTS = 16  # parts that the keys of one query are split into
_PROCESSORS = 132  # multiprocessors of an H100
_OUTPUTS = 64  # outputs of a tile: from 64 on, Hopper's bfloat16 instructions are those of warp groups
_STEP = 128  # inputs that a part is a multiple of; the steps of all tiles divide it
_MOST_TOKENS = 128  # tokens of a tile


@dataclass(frozen=True, slots=True)
class Tiles:
    """Says how a product is divided among programs.

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


def product_tiles(outputs: int, inputs: int, tokens: int, bytes_per_value: int) -> Tiles:
    """Returns the tiles of a product.

    Args:
        outputs: Number of outputs, of all layers of the input together.
        inputs: Number of inputs.
        tokens: Number of tokens.
        bytes_per_value: 2 for bfloat16, 4 for float32.
    """
    length = _length(outputs, inputs)
    parts = _ceil(inputs, length)
    block = 16
    while block < min(tokens, _MOST_TOKENS):
        block *= 2
    areas = _ceil(outputs, _OUTPUTS) * _ceil(tokens, block)
    # sums of parts are traffic: enough programs without them run all parts
    folded = areas >= 2 * _PROCESSORS
    programs = areas if folded else areas * parts
    if bytes_per_value == 4:
        rows, step, stages = _OUTPUTS, 32, 2
    elif block <= 32:
        # reading weights takes the time; three stages fit a third program onto each multiprocessor
        last_fits = 2 * _PROCESSORS < programs <= 3 * _PROCESSORS
        rows, step, stages = _OUTPUTS, 128, 3 if last_fits else 4
    elif programs <= 2 * _PROCESSORS:
        rows, step, stages = _OUTPUTS, 64, 4
    else:
        rows, step, stages = 2 * _OUTPUTS, 64, 3
    return Tiles(rows, block, step, parts, length, folded, warps=4, stages=stages)


def attention_sums(tokens: int, kv_heads: int) -> int:
    """Returns how many partial results attention writes for each query: one if a program runs all parts."""
    return 1 if tokens * kv_heads >= 2 * _PROCESSORS else ATTENTION_PARTS


def _length(outputs: int, inputs: int) -> int:
    """Returns the inputs of a part, such that there is a program for each multiprocessor at few tokens."""
    wanted = max(_PROCESSORS // _ceil(outputs, _OUTPUTS), 1)
    return _ceil(_ceil(inputs, wanted), _STEP) * _STEP


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)
