"""The native kernels against float64 references, and what happens where they cannot be built."""

import math
import os

import numpy as np
import pytest
import torch

from paceline.rollout import SamplingParams
from paceline.rollout.native import AttentionRule, Int8Rows, RaggedTokens, build, load_kernels
from paceline.rollout.native import loading as native
from paceline.rollout.sampling import draw_tokens, processed_probs

pytestmark = pytest.mark.skipif(load_kernels("cpu", torch.float32) is None, reason="no C++ compiler")
RULES = [
    AttentionRule(0.1),
    AttentionRule(0.2, softcap=5.0),
    AttentionRule(0.1, window=7),
    AttentionRule(0.1, window=300),
]


@pytest.fixture(scope="module")
def kernels():
    return load_kernels("cpu", torch.float32)


def reference_attention(query, cache, tokens: RaggedTokens, rule: AttentionRule) -> torch.Tensor:
    """[N, H, d] in float64, one token at a time."""
    heads, kv_heads = query.shape[2], cache.shape[2]
    rows = []
    for n in range(query.shape[1]):
        slot, position = int(tokens.token_slots[n]), int(tokens.positions[n])
        first = max(position - rule.window + 1, 0) if rule.window else 0
        keys, values = (
            cache[:, slot, :, first : position + 1].double().repeat_interleave(heads // kv_heads, dim=1)
        )
        scores = torch.einsum("hd,htd->ht", query[0, n].double(), keys) * rule.scale
        if rule.softcap:
            scores = rule.softcap * torch.tanh(scores / rule.softcap)
        rows.append(torch.einsum("ht,htd->hd", scores.softmax(-1), values))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_ragged_attention(dim, rule, dtype):
    """One token far past a chunk of keys, a long piece of a prompt, a first token, and a slot out of
    order."""
    torch.manual_seed(0)
    tokens = RaggedTokens(slots=[3, 0, 1, 2], starts=[700, 250, 0, 30], counts=[1, 21, 1, 5])
    cache = torch.randn(2, 4, 2, 768, dim).to(dtype)
    query = torch.randn(1, 28, 6, dim).to(dtype)
    got = load_kernels("cpu", dtype).attend(query, cache, tokens, rule).view(28, 6, dim)
    # weights and results are rounded to bfloat16: 2^-9 of the largest that either can be
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (2**-7, 2**-8)
    torch.testing.assert_close(
        got.double(), reference_attention(query, cache, tokens, rule), rtol=rtol, atol=atol
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_gets_the_same_whoever_is_beside_it(dtype):
    """Bit for bit: or drafts would change what a sequence says by rounding."""
    torch.manual_seed(0)
    kernels = load_kernels("cpu", dtype)
    cache, query = torch.randn(2, 2, 3, 768, 64).to(dtype), torch.randn(1, 20, 9, 64).to(dtype)
    together = kernels.attend(query, cache, RaggedTokens([0, 1], [500, 290], [9, 11]), AttentionRule(0.125))
    for n, (slot, place) in enumerate([(0, 500 + i) for i in range(9)] + [(1, 290 + i) for i in range(11)]):
        alone = kernels.attend(
            query[:, n : n + 1], cache, RaggedTokens([slot], [place], [1]), AttentionRule(0.125)
        )
        assert torch.equal(alone[0, 0], together[0, n])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_never_reads_past_a_sequence(dtype):
    """What an earlier sequence left behind, NaN included, does not matter."""
    torch.manual_seed(0)
    kernels = load_kernels("cpu", dtype)
    tokens = RaggedTokens(slots=[0, 1], starts=[4, 9], counts=[2, 1])
    cache, query = torch.randn(2, 2, 1, 128, 32).to(dtype), torch.randn(1, 3, 2, 32).to(dtype)
    clean = kernels.attend(query, cache, tokens, AttentionRule(0.2))
    cache[:, 0, :, 6:], cache[:, 1, :, 10:] = math.nan, math.inf
    assert torch.equal(kernels.attend(query, cache, tokens, AttentionRule(0.2)), clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_stays_in_its_sequence(dtype):
    kernels = load_kernels("cpu", dtype)
    tokens = RaggedTokens(slots=[0, 1], starts=[4, 9], counts=[1, 1])
    cache, query = torch.randn(2, 2, 1, 128, 32).to(dtype), torch.randn(1, 2, 2, 32).to(dtype)
    cache[0, 0, :, 2] = math.nan
    out = kernels.attend(query, cache, tokens, AttentionRule(0.2))
    assert out[0, 0].isnan().all()
    assert out[0, 1].isfinite().all()


def test_norm_gate_and_bfloat16_rounding(kernels):
    torch.manual_seed(0)
    x, gain = torch.randn(5, 64) * 3, torch.randn(64)
    double = x.double()
    wanted = double * (double.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * gain
    torch.testing.assert_close(kernels.rms_norm(x, gain, 1e-5).double(), wanted, rtol=1e-5, atol=1e-6)
    gate, up = (x * 20).double().chunk(2, -1)
    torch.testing.assert_close(
        kernels.silu_gate(x * 20).double(), gate * gate.sigmoid() * up, rtol=1e-5, atol=1e-6
    )
    half = load_kernels("cpu", torch.bfloat16)
    ones = torch.ones(64, dtype=torch.bfloat16)
    y = x.bfloat16()
    exact = y.double() * (y.double().pow(2).mean(-1, keepdim=True)).rsqrt()
    # the nearest bfloat16 is at most half a unit in the last place away
    assert ((half.rms_norm(y, ones, 0.0).double() - exact).abs() <= exact.abs() * 2**-8).all()
    assert half.rms_norm(torch.full((1, 64), math.nan).bfloat16(), ones, 0.0).isnan().all()


@pytest.mark.parametrize("vocab", [6, 97, 1000, 4099])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draw_inverts_the_cumulative_sum(vocab, dtype):
    rng = np.random.default_rng(0)
    rows = 400
    logits = torch.from_numpy(rng.normal(size=(rows, vocab)) * 3).to(dtype)
    logits[::5, ::3] = -math.inf
    temperatures = torch.from_numpy(rng.choice([0.0, 0.6, 1.0, 1.7], size=rows)).float()
    uniform = torch.from_numpy(rng.random(rows))
    tokens, logprobs = load_kernels("cpu", dtype).draw(logits, temperatures, uniform)
    scores = logits.double().numpy()
    for row in range(rows):
        t = float(temperatures[row]) or 1.0
        p = np.exp((scores[row] - scores[row].max()) / t)
        p /= p.sum()
        ends = p.cumsum()
        token = int(tokens[row])
        if temperatures[row] == 0:
            assert token == int(scores[row].argmax())
        else:  # the token whose stretch of [0, 1) holds the uniform, up to rounding at its ends
            assert ends[token] - p[token] - 1e-6 <= float(uniform[row]) <= ends[token] + 1e-6
        assert p[token] > 0
        assert float(logprobs[row]) == pytest.approx(math.log(p[token]), abs=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_draw_reports_unusable_rows(kernels, bad):
    logits = torch.randn(3, 40)
    logits[1, 17] = bad
    _, logprobs = kernels.draw(logits, torch.tensor([1.0, 1.0, 0.0]), torch.rand(3, dtype=torch.float64))
    assert logprobs.isnan().tolist() == [False, True, False]
    assert (
        kernels.draw(torch.full((1, 40), -math.inf), torch.ones(1), torch.zeros(1, dtype=torch.float64))[1]
        .isnan()
        .all()
    )


def test_draw_at_the_ends_of_the_interval(kernels):
    logits = torch.full((2, 600), -math.inf)
    logits[:, [3, 300, 595]] = 0.0
    tokens, _ = kernels.draw(logits, torch.ones(2), torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64))
    assert tokens.tolist() == [3, 595]


def test_both_ways_of_drawing_agree(monkeypatch):
    """A truncated row sends its batch to torch's operators: the neighbours' tokens must not change by
    that."""
    torch.manual_seed(0)
    logits, uniform = torch.randn(300, 500) * 2, torch.rand(300, dtype=torch.float64)
    params = [SamplingParams(temperature=t) for t in (0.0, 0.7, 1.0)] * 100
    fast = draw_tokens(logits, params, uniform)
    slow = draw_tokens(logits, [*params[:-1], SamplingParams(top_k=5)], uniform)
    assert (fast[0][:-1] == slow[0][:-1]).all()
    torch.testing.assert_close(fast[1][:-1], slow[1][:-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 0.01, 3.0])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.95, 0.9999])
def test_nucleus_without_a_sort_is_the_one_with(scale, top_p):
    """Also flat distributions, where the few likeliest tokens do not reach the mass, and ties, of which the
    first stay.
    """
    torch.manual_seed(0)
    logits = (torch.randn(20, 1500) * scale * 4).round() / 4
    mine = processed_probs(logits[:, None], [SamplingParams(top_p=top_p)] * 20)[:, 0]
    probs = logits.softmax(-1)
    values, order = probs.sort(dim=-1, descending=True, stable=True)
    before = values.double().cumsum(-1) - values.double()
    kept = torch.zeros_like(probs).scatter_(-1, order, values.masked_fill(before >= top_p - 1e-9, 0.0))
    differing = ((mine > 0) != (kept > 0)).sum(-1)
    assert (differing <= 1).all(), "more than the token at the threshold's own rounding differs"
    same = differing == 0
    assert same.float().mean() > 0.5
    torch.testing.assert_close(mine[same], (kept / kept.sum(-1, keepdim=True))[same], rtol=1e-4, atol=1e-7)


def test_without_a_compiler_a_line_says_so(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native._log, "disabled", False)  # by a library that configures logging
    assert native.load_kernels.__wrapped__("cpu", torch.float32) is None
    assert "install g++" in caplog.text


def test_a_failing_compiler_is_named(monkeypatch, tmp_path):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'kernels.cpp:1: error: no such instruction' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(build.NativeUnavailable, match="no such instruction"):
        build.build_library()
    assert not list((tmp_path / "cache").rglob("*.so"))


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_privately_built", {})
    for log in (build._log, native._log):  # a library that configures logging disables those that it meets
        monkeypatch.setattr(log, "disabled", False)
    return tmp_path / "paceline" / "native"


def test_clang_is_refused(monkeypatch, tmp_path):
    """Its OpenMP library and torch's would each answer for the other's threads: work would be done twice."""
    clang = tmp_path / "clang++"
    clang.write_text('#!/bin/sh\nexec g++ -D__clang__ "$@"\n')
    clang.chmod(0o755)
    monkeypatch.setenv("CXX", str(clang))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(
        build.NativeUnavailable, match=r"clang.* could not build .* need GCC, .* install g\+\+"
    ):
        build.build_library()


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Writes the number of its runs; what it makes is a real library, copied."""
    real = build.build_library()
    made = tmp_path / "g++"
    made.write_text(f'#!/bin/sh\necho run >> {tmp_path}/runs\nfor last; do :; done\ncp {real} "$last"\n')
    made.chmod(0o755)
    monkeypatch.setenv("CXX", str(made))
    return lambda: len((tmp_path / "runs").read_text().split()) if (tmp_path / "runs").exists() else 0


def loaded() -> bool:
    return native.load_kernels.__wrapped__("cpu", torch.float32) is not None


def test_the_library_is_built_once(compiler, cache):
    first = build.build_library()
    stamp = first.stat().st_mtime_ns
    assert build.build_library() == first
    assert first.stat().st_mtime_ns == stamp
    assert compiler() == 1


def test_machines_with_one_instruction_set_share_a_library(compiler, cache, monkeypatch):
    """A home directory may be shared: another processor's other features do not matter, another set does."""
    features = build._processor_features()
    first = build.build_library()
    monkeypatch.setattr(build, "_processor_features", lambda: f"{features} one_more")
    assert build.build_library() == first
    others = [name for name in build.runnable_instruction_sets() if name != build.instruction_set()]
    for name in others[:1]:
        monkeypatch.setenv("PACELINE_ISA", name)
        assert build.build_library() != first
    assert compiler() == 1 + len(others[:1])


def others_write_to_the_directory(folder, path):
    folder.chmod(0o777)


def others_write_to_the_file(folder, path):
    path.chmod(0o722)


def another_users_file(folder, path):
    os.chown(path, 12345, -1)


def another_users_directory(folder, path):
    os.chown(folder, 12345, -1)


def a_link_elsewhere(folder, path):
    path.rename(path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


@pytest.mark.parametrize(
    "tamper",
    [
        *(others_write_to_the_directory, others_write_to_the_file, a_link_elsewhere),
        pytest.param(
            another_users_file, marks=pytest.mark.skipif(os.getuid() != 0, reason="chown needs root")
        ),
        pytest.param(
            another_users_directory, marks=pytest.mark.skipif(os.getuid() != 0, reason="chown needs root")
        ),
    ],
)
def test_a_cache_that_others_can_write_to_is_not_loaded(compiler, cache, caplog, tamper):
    path = build.build_library()
    assert path.parent == cache and compiler() == 1
    assert not cache.stat().st_mode & 0o077 and not path.stat().st_mode & 0o077
    tamper(cache, path)
    again = build.build_library()
    assert again.parent != cache and compiler() == 2
    assert loaded() and build.build_library() == again
    assert len(caplog.records) == 1 and "built for this process alone" in caplog.text


def test_a_broken_library_is_built_anew(compiler, cache):
    path = build.build_library()
    path.write_bytes(path.read_bytes()[:1000])
    assert build.build_library() == path
    assert compiler() == 2 and loaded()


def test_a_cache_that_cannot_be_made_is_gone_without(compiler, cache, caplog):
    cache.parent.write_text("a file")
    assert loaded() and loaded()
    assert compiler() == 1 and len(caplog.records) == 1


def test_a_user_without_a_home(compiler, cache, monkeypatch, caplog):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(
        build.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))
    )
    assert loaded()
    assert "home directory" in caplog.text


def test_nowhere_to_build_is_said_in_a_line(compiler, cache, monkeypatch, caplog):
    cache.parent.write_text("a file")
    monkeypatch.setattr(
        build.tempfile, "mkdtemp", lambda prefix: (_ for _ in ()).throw(OSError("no space left on device"))
    )
    assert not loaded()
    assert "no space left on device" in caplog.records[-1].getMessage()


def test_ranks_that_build_at_once_all_get_a_library(compiler, cache):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: build.build_library(), range(4)))
    assert len(set(paths)) == 1 and paths[0].exists()
    assert [p.name for p in cache.iterdir()] == [paths[0].name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (100, 576), (1536, 1152)])
def test_products_with_8_bit_weights(outputs, inputs, dtype):
    torch.manual_seed(0)
    weights = Int8Rows(torch.randn(outputs, inputs) * torch.rand(outputs, 1))
    exact = (weights.weights.double() - 128) * weights.scales.double()[:, None]
    # whole numbers to 127, times a power of two for each 64: 8 bits hold them exactly
    whole = torch.randint(-127, 128, (9, inputs // 64, 64))
    whole[..., 0] = 127
    whole[3, 0] = 0  # a group without a scale
    x = (whole * 2.0 ** torch.randint(-4, 5, (9, inputs // 64, 1))).flatten(1).to(dtype)
    multiply = load_kernels("cpu", dtype).multiply
    expected = x.double() @ exact.T
    rtol, atol = (2**-8, 1e-2) if dtype == torch.bfloat16 else (1e-4, 1e-2)
    for rows in range(1, 10):
        found = multiply(x[:rows], weights)
        torch.testing.assert_close(found.double(), expected[:rows], rtol=rtol, atol=atol)
        assert torch.equal(found, multiply(x, weights)[:rows]), "a row does not depend on the others"
