"""Every write to weights is noticed, and nothing else."""

import pytest
import torch
from torch import nn

from paceline.rl.integrations.fingerprint import fingerprint, multilinear_hash, tensors_held


def by_products(tensors):
    """What devices other than the CPU compute."""
    return [int(multilinear_hash(t.detach().contiguous().reshape(-1).view(torch.uint8))) for t in tensors]


def in_place(weight):
    weight[3, 5] += 1


def through_data(weight):
    weight.data.copy_(weight.data * 1.5)


def through_a_flat_buffer(weight):
    weight.data.view(-1)[-1] = 7.0


def from_numpy(weight):
    weight.detach().view(torch.int16).numpy()[0, 0] ^= 1


def rows_exchanged(weight):
    weight.copy_(weight[[1, 0, *range(2, len(weight))]])


def signs(weight):
    weight.neg_()


def one_last_bit(weight):
    weight.view(torch.int16)[2, 2] ^= 1


@pytest.mark.parametrize("digest", [fingerprint, by_products])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "write",
    [in_place, through_data, through_a_flat_buffer, from_numpy, rows_exchanged, signs, one_last_bit],
    ids=lambda f: f.__name__,
)
@torch.no_grad()
def test_every_write_is_noticed(digest, dtype, write):
    torch.manual_seed(0)
    weights = [torch.randn(8, 12).to(dtype), torch.eye(9, 7, dtype=dtype)]
    before = digest(weights)
    assert digest([w.clone() for w in weights]) == before
    write(weights[0])
    assert digest(weights) != before
    assert digest(weights[:1]) != before


@pytest.mark.parametrize("digest", [fingerprint, by_products])
def test_permutations_of_an_identity_differ(digest):
    """What sums of rows and columns would not tell apart."""
    seen = [
        digest([torch.eye(6)[order]])
        for order in ([0, 1, 2, 3, 4, 5], [2, 1, 0, 3, 4, 5], [5, 4, 3, 2, 1, 0])
    ]
    assert len({str(s) for s in seen}) == 3


def test_places_far_apart_differ_on_a_device():
    """Also where one pass does not read all of a tensor."""
    weights = torch.zeros((1 << 20) + 3)
    seen = set()
    for place in (0, 1, 1 << 20, (1 << 20) + 2):
        weights.zero_()[place] = 1
        seen.add(by_products([weights])[0])
    assert len(seen) == 4


def test_shapes_and_odd_sizes_are_told_apart():
    assert fingerprint([torch.zeros(2, 3)]) != fingerprint([torch.zeros(3, 2)])
    assert fingerprint([torch.zeros(())]) != fingerprint([torch.zeros((), dtype=torch.bfloat16)])
    odd = torch.arange(6, dtype=torch.bfloat16)[1:4]
    assert by_products([odd]) != by_products([odd.flip(0)])
    assert fingerprint([torch.empty(0)]) == fingerprint([torch.empty(0)])


def test_parts_are_read_where_the_whole_is_not_there():
    """As ZeRO 3 leaves a parameter: empty, with the rank's part beside it; or on a disk."""
    module = nn.Linear(4, 4, bias=False)
    module.register_buffer("scale", torch.ones(1))
    part = torch.arange(8.0)
    part.ds_numel = 8
    module.weight.data, module.weight.ds_tensor = torch.empty(0), part
    before = fingerprint(tensors_held(module))
    part[3] = -1
    assert fingerprint(tensors_held(module)) != before
    before = fingerprint(tensors_held(module))
    module.scale.fill_(2)
    assert fingerprint(tensors_held(module)) != before
    part.ds_numel = 9
    assert tensors_held(module) is None
