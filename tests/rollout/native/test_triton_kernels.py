"""The Triton kernels compute what float64 does: on a GPU, or in Triton's interpreter without one."""

import pytest
import torch

pytest.importorskip("triton")

from paceline.rollout.model.attention import seat_bias
from paceline.rollout.native import AttentionRule, DeviceTokens, PagedLines, gpu_tiles
from paceline.rollout.native.triton_kernels import Sums, TritonKernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = TritonKernels()
SLOTS, SPAN, PAGE = 4, 200, 32


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6) -> None:
    gap = (actual.double() - expected).norm() / expected.norm()
    assert gap <= tolerance, gap


def tokens(rows: list[tuple[int, int, int, int, int]]) -> DeviceTokens:
    """Tokens of (slot, position, place, trunk, ancestors)."""
    slot, position, place, trunk, ancestors = torch.tensor(rows, device=DEVICE).T
    return DeviceTokens(torch.stack([slot, position, position, place, trunk, ancestors]).contiguous())


def paged(cache: torch.Tensor) -> PagedLines:
    """A cache [2, slots, KV, span, d] in pages, in no order."""
    _, slots, kv_heads, span, dim = cache.shape
    parts = -(-span // PAGE)
    order = torch.randperm(slots * parts, generator=torch.Generator().manual_seed(5))
    pages = torch.zeros(slots * parts, 2, kv_heads, PAGE, dim, device=DEVICE)
    for i, page in enumerate(order.tolist()):
        piece = cache[:, i // parts, :, i % parts * PAGE : (i % parts + 1) * PAGE]
        pages[page, :, :, : piece.shape[2]] = piece
    return PagedLines(pages, order.view(slots, parts).to(DEVICE, torch.int32))


def slots_of(cache: PagedLines) -> torch.Tensor:
    """The inverse of `paged`: [2, slots, KV, span, d]."""
    return cache.lines[cache.table.long()].permute(2, 0, 3, 1, 4, 5).flatten(3, 4)[:, :, :, :SPAN]


# a lone token, one with a full slot, two of a chain, three nodes of a tree (the last two are siblings),
# and padding, which sees nothing
TOKENS = [
    (1, 0, 0, 1, 0),
    (0, 150, 150, 151, 0),
    (3, 39, 39, 40, 0),
    (3, 40, 40, 41, 0),
    (2, 97, 97, 97, 0b1),
    (2, 98, 98, 97, 0b11),
    (2, 98, 99, 97, 0b101),
    (0, 0, SPAN - 1, 0, 0),
]


@pytest.mark.parametrize("width", [64, 100])
def test_rms_norm(width):
    x, gain = random(3, 5, width), random(width, seed=1)
    wide = x.double()
    expected = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * gain.double()
    close(KERNELS.rms_norm(x, gain, 1e-5), expected)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dim", [32, 80])
def test_rotate_and_store(norm, dim):
    heads, kv_heads, count = 6, 2, len(TOKENS)
    cache = torch.zeros(2, SLOTS, kv_heads, SPAN, dim, device=DEVICE)
    q, k, v = (random(1, count, n * dim, seed=n) for n in (heads, kv_heads, kv_heads + 1))
    v = v[..., : kv_heads * dim]
    cos, sin = random(1, count, dim, seed=7), random(1, count, dim, seed=8)
    gains = (random(dim, seed=9), random(dim, seed=10)) if norm else None
    described = tokens(TOKENS)
    pages = paged(cache)
    joined = torch.cat([q, k, v], dim=-1)
    first, second = random(*joined.shape, seed=11), random(*joined.shape, seed=12)
    sums = Sums(torch.cat([joined - first - second, first, second]), joined.dtype)
    query = KERNELS.rotate_and_store(sums, (cos, sin), gains, 1e-5, described, pages)

    def rotated(x: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
        x = x.double().view(count, -1, dim)
        if gain is not None:
            x = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * gain.double()
        half = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1)
        return x * cos.double()[0, :, None] + half * sin.double()[0, :, None]

    close(query[0], rotated(q, gains[0] if gains else None))
    expected = cache.double()
    keys = rotated(k, gains[1] if gains else None)
    for i, (slot, _, place, *_) in enumerate(TOKENS):
        expected[0, slot, :, place], expected[1, slot, :, place] = keys[i], v.double().view(count, -1, dim)[i]
    close(slots_of(pages), expected)


@pytest.fixture(params=[5, 3], ids=["in parts", "in one program"])
def programs(request, monkeypatch) -> None:
    """What writes parts of attention, and multiprocessors so few that programs run all parts."""
    if request.param == 3:
        monkeypatch.setattr(gpu_tiles, "_PROCESSORS", 1)
    monkeypatch.setattr(gpu_tiles, "ATTENTION_PARTS", request.param)


@pytest.mark.parametrize(
    "rule", [AttentionRule(0.2), AttentionRule(0.2, 3.0, 0), AttentionRule(0.2, 0.0, 30)], ids=str
)
def test_attention(programs, rule):
    heads, kv_heads, dim = 6, 2, 48
    cache = random(2, SLOTS, kv_heads, SPAN, dim, seed=1)
    rows = TOKENS
    described = tokens(rows)
    query = random(1, len(rows), heads, dim, seed=2)
    actual = KERNELS.attend(query, paged(cache), described, rule)[0].view(len(rows), heads, dim)
    bias = seat_bias(described.seats, SPAN, rule.window or None, torch.float64)[0]
    for i, (slot, *_, trunk, ancestors) in enumerate(rows):
        keys, values = (x.double().repeat_interleave(heads // kv_heads, 0) for x in cache[:, slot])
        scores = (query[0, i].double()[:, None] @ keys.transpose(1, 2))[:, 0] * rule.scale
        if rule.softcap:
            scores = rule.softcap * torch.tanh(scores / rule.softcap)
        if trunk + ancestors == 0:
            assert not actual[i].any()
            continue
        weights = torch.softmax(scores + bias[i], -1)
        close(actual[i], (weights[:, None] @ values)[:, 0], 1e-5)


@pytest.mark.parametrize("window", [0, 30])
def test_a_token_attends_alone_as_among_others(window, monkeypatch):
    """A chain's token sees nothing but a trunk, as in plain decoding."""
    heads, kv_heads, dim = 4, 2, 32
    rule = AttentionRule(0.2, 0.0, window)
    cache = paged(random(2, SLOTS, kv_heads, SPAN, dim, seed=1))
    chain = [(i % SLOTS, 3 * i, 3 * i, 3 * i + 1, 0) for i in range(40)]
    query = random(1, len(chain), heads, dim, seed=2)
    monkeypatch.setattr(gpu_tiles, "ATTENTION_PARTS", 4)
    monkeypatch.setattr(gpu_tiles, "_PROCESSORS", 20)  # so that forty tokens are not in parts
    assert gpu_tiles.attention_sums(40, kv_heads) == 1 < gpu_tiles.attention_sums(1, kv_heads)
    together = KERNELS.attend(query, cache, tokens(chain), rule)
    for i in (0, 17, 39):
        alone = KERNELS.attend(query[:, i : i + 1], cache, tokens(chain[i : i + 1]), rule)
        assert torch.equal(alone[0, 0], together[0, i])


def test_drawing_inverts_the_cumulative_sum():
    rows, vocab = 6, 9000
    logits = random(rows, vocab, seed=3) * 3
    temperatures = torch.tensor([1.0, 0.5, 1.5, 1.0, 0.0, 1.0], dtype=torch.float64, device=DEVICE)
    uniform = torch.tensor([0.3, 0.9, 0.0, 1 - 1e-12, 0.5, 0.7], dtype=torch.float64, device=DEVICE)
    logits[5, 3] = float("nan")
    tokens, logprobs = KERNELS.draw(logits, temperatures.float().cpu(), uniform.cpu())
    scale = torch.where(temperatures == 0, 1.0, temperatures)
    probs = torch.softmax(logits.double() / scale[:, None], -1)
    ends = probs.cumsum(-1)
    for row in range(4):
        token = int(tokens[row])
        before = 0.0 if token == 0 else float(ends[row, token - 1])
        assert before - 1e-6 <= float(uniform[row]) <= float(ends[row, token]) + 1e-6
        assert float(logprobs[row]) == pytest.approx(float(probs[row, token].log()), abs=1e-5)
    assert int(tokens[4]) == int(logits[4].argmax())
    assert float(logprobs[4]) == pytest.approx(float(probs[4].max().log()), abs=1e-5)
    assert logprobs[5].isnan()


def test_tokens_of_weight_zero_are_never_drawn():
    logits = torch.full((2, 5000), -1e4, device=DEVICE)
    logits[:, 4321] = 0.0
    uniform = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert KERNELS.draw(logits, torch.ones(2), uniform)[0].tolist() == [4321, 4321]


def test_following_a_draft_samples_along_its_accepted_path():
    """Each sequence takes the path that drawing its rows one by one takes."""
    vocab, parents = 5000, [-1, -1, 0, 0, 2, 1, 5]
    counts, temperatures = [7, 7, 3, 0], [0.0, 1.0, 0.7, 1.0]
    nodes, width = torch.tensor(counts), len(parents)
    first = (nodes + 1).cumsum(0) - nodes - 1
    logits = random(sum(counts) + 4, vocab, seed=9) * 4
    uniforms = torch.rand(4, width + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def sampled(sequence: int, node: int, depth: int) -> tuple[int, float]:
        row = int(first[sequence]) + 1 + node
        token, logprob = KERNELS.draw(
            logits[row : row + 1],
            torch.tensor(temperatures[sequence : sequence + 1]),
            uniforms[sequence, depth : depth + 1],
        )
        return int(token), float(logprob)

    # nodes of other branches hold tokens of the paths, too: one before the node on the path, one after it
    drafted = torch.full((4, width), 1)
    wanted = {0: [0, 2, 4], 1: [1, 5, 6], 2: [0, 2], 3: []}
    for sequence, path in wanted.items():
        for depth, node in enumerate(path):
            drafted[sequence, node] = sampled(sequence, parents[node], depth)[0]
    drafted[0, 6], drafted[1, 2] = drafted[0, 4], drafted[1, 5]
    found = KERNELS.follow(
        logits,
        first,
        nodes,
        (drafted.to(DEVICE), torch.tensor([parents] * 4)),
        (torch.tensor(temperatures), uniforms),
    )
    for sequence, expected in wanted.items():
        count = len(expected)
        assert found.path[sequence, : found.lengths[sequence]].tolist() == expected
        steps = [sampled(sequence, node, depth) for depth, node in enumerate([-1, *expected])]
        assert found.tokens[sequence, : count + 1].tolist() == [token for token, _ in steps]
        assert found.logprobs[sequence, : count + 1].tolist() == [value for _, value in steps]
        drafts = drafted[sequence, : counts[sequence]].tolist()
        assert found.drafted[sequence, : counts[sequence]].tolist() == drafts
