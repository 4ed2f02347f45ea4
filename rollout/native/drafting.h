// One step of a one-layer drafter over a few tokens, with 8-bit weights. Such a step is bound by reading weights, so
// half the bytes take half the time. Drafts are verified, so rounding can only cost acceptance.
#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "attention.h"

namespace {

constexpr int64_t kGroup = 64;  // inputs that share a scale, and bytes in a vector

// A matrix [outputs, inputs] with one scale per row; 128 is added to every weight to make it unsigned.
struct Quantized {
  const uint8_t* weights;
  const float* scales;
  int64_t outputs, inputs;
};

// Returns 16 sums of four products each, of a group's 64 bytes of weights and inputs.
inline Ints dot_group(const uint8_t* w, const int8_t* x) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(w), _mm512_loadu_si512(x));
#elif defined(__AVX2__)
  __m256i halves[2];
  for (int64_t i = 0; i < 2; ++i) {
    halves[i] = _mm256_setzero_si256();
    for (int64_t at = 32 * i; at < 32 * (i + 1); at += 16) {
      const __m256i weights = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + at)));
      const __m256i inputs = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + at)));
      halves[i] = _mm256_add_epi32(halves[i], _mm256_madd_epi16(weights, inputs));
    }
  }
  Ints sums;
  std::memcpy(&sums, halves, sizeof sums);
  return sums;
#else
  int32_t lanes[kLanes] = {};
  for (int64_t i = 0; i < kGroup; ++i) lanes[i / 4] += static_cast<int32_t>(w[i]) * x[i];
  Ints sums;
  std::memcpy(&sums, lanes, sizeof sums);
  return sums;
#endif
}

// Inputs in 8 bits, with one scale for every 64. `shift` is what the 128 added to the weights contributes to each row's
// products.
struct Activations {
  std::vector<int8_t> values;
  std::vector<float> scales, shift;

  template <typename T>
  void read(const T* x, int64_t rows, int64_t inputs) {
    values.resize(rows * inputs), scales.resize(rows * inputs / kGroup), shift.assign(rows, 0.0f);
    for (int64_t g = 0; g < rows * inputs / kGroup; ++g) {
      alignas(64) float group[kGroup];
      Floats most = {};
      for (int64_t i = 0; i < kGroup; i += kLanes) {
        const Floats v = load(x + g * kGroup + i);
        const Floats size = select(v < splat(0.0f), -v, v);
        most = select(size > most, size, most);
        store(group + i, v);
      }
      float largest = 0;
      for (int64_t i = 0; i < kLanes; ++i) largest = std::max(largest, most[i]);
      const float scale = largest / 127.0f, inverse = largest > 0 ? 127.0f / largest : 0.0f;
      Ints totals = {};
      for (int64_t i = 0; i < kGroup; i += kLanes) {
        const Floats v = load(group + i) * inverse;
        const Ints q = to_ints(v + select(v < splat(0.0f), splat(-0.5f), splat(0.5f)));
        totals += q;
        store_bytes(values.data() + g * kGroup + i, q);
      }
      int32_t total = 0;
      for (int64_t i = 0; i < kLanes; ++i) total += totals[i];
      scales[g] = scale;
      shift[g * kGroup / inputs] += 128.0f * scale * static_cast<float>(total);
    }
  }
};

// Multiplies kRows rows of inputs, from `row` on, by kOutputs rows of weights.
template <int kRows, int kOutputs, typename T>
void dot_block(const Activations& x, int64_t row, const Quantized& w, int64_t first, const T* residual, T* out) {
  const int64_t groups = w.inputs / kGroup;
  Floats sums[kRows][kOutputs] = {};
  for (int64_t g = 0; g < groups; ++g) {
    const int8_t* rows[kRows];
    Floats scales[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      rows[r] = x.values.data() + (row + r) * w.inputs + g * kGroup;
      scales[r] = splat(x.scales[(row + r) * groups + g]);
    }
#pragma GCC unroll 4
    for (int o = 0; o < kOutputs; ++o) {
      const uint8_t* weight = w.weights + (first + o) * w.inputs + g * kGroup;
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sums[r][o] += to_floats(dot_group(weight, rows[r])) * scales[r];
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int o = 0; o < kOutputs; ++o) {
      const int64_t at = (row + r) * w.outputs + first + o;
      const float value = (sum(sums[r][o]) - x.shift[row + r]) * w.scales[first + o];
      out[at] = from_float<T>(value + (residual != nullptr ? to_float(residual[at]) : 0.0f));
    }
}

// Multiplies x [rows, inputs] by the matrix and adds the residual if it is not null; out is [rows, outputs].
template <typename T>
void multiply(const T* x, int64_t rows, const Quantized& w, const T* residual, T* out) {
  static thread_local Activations activations_of_thread;
  Activations& activations = activations_of_thread;
  activations.read(x, rows, w.inputs);
  constexpr int kOutputs = 4;
#pragma omp parallel for
  for (int64_t first = 0; first < w.outputs; first += kOutputs) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) dot_block<4, kOutputs>(activations, r, w, first, residual, out);
    if (rows - r == 3) dot_block<3, kOutputs>(activations, r, w, first, residual, out);
    if (rows - r == 2) dot_block<2, kOutputs>(activations, r, w, first, residual, out);
    if (rows - r == 1) dot_block<1, kOutputs>(activations, r, w, first, residual, out);
  }
}

// EAGLE-3's layer: (norm of the token's embedding, norm of its parent's hidden state) → attention → gated MLP → head.
template <typename T>
struct DraftLayer {
  int64_t hidden, intermediate, vocab;
  Quantized qkv, o, gate_up, down, head;
  const T *embeddings, *of_embedding, *of_hidden, *of_mlp, *of_head, *cosines, *sines;
  float eps, scale;
};

// Runs the layer on tokens [N] with hidden states [N, hidden] at the layout's places; writes outputs [N, hidden] and
// logits [N, vocab].
template <typename T>
void draft_step(const DraftLayer<T>& d, const int64_t* tokens, const int64_t* positions, const T* hidden, T* cache, const Layout& s,
                T* out, T* logits) {
  const int64_t n = s.tokens, all = (s.heads + 2 * s.kv_heads) * s.dim, inner = s.heads * s.dim;
  static thread_local std::vector<T> memory;
  memory.resize(n * (2 * d.hidden + all + 2 * inner + 2 * d.hidden + 3 * d.intermediate + 2 * s.dim));
  T* joined = memory.data();
  T* heads = joined + n * 2 * d.hidden;
  T* query = heads + n * all;
  T* attended = query + n * inner;
  T* middle = attended + n * inner;
  T* normed = middle + n * d.hidden;
  T* gates = normed + n * d.hidden;
  T* gated = gates + n * 2 * d.intermediate;
  T* angles = gated + n * d.intermediate;
  for (int64_t i = 0; i < n; ++i) {
    rms_norm_row(d.embeddings + tokens[i] * d.hidden, d.of_embedding, joined + i * 2 * d.hidden, d.hidden, d.eps);
    rms_norm_row(hidden + i * d.hidden, d.of_hidden, joined + (2 * i + 1) * d.hidden, d.hidden, d.eps);
    std::memcpy(angles + i * s.dim, d.cosines + positions[i] * s.dim, s.dim * sizeof(T));
    std::memcpy(angles + (n + i) * s.dim, d.sines + positions[i] * s.dim, s.dim * sizeof(T));
  }
  multiply(joined, n, d.qkv, static_cast<const T*>(nullptr), heads);
  rotate_and_store(heads, angles, angles + n * s.dim, static_cast<const T*>(nullptr), static_cast<const T*>(nullptr), 0.0f, query, cache, s);
  attend_any(query, cache, attended, s, AttentionRule{d.scale, 0.0f, 0});
  multiply(attended, n, d.o, hidden, middle);
  for (int64_t i = 0; i < n; ++i) rms_norm_row(middle + i * d.hidden, d.of_mlp, normed + i * d.hidden, d.hidden, d.eps);
  multiply(normed, n, d.gate_up, static_cast<const T*>(nullptr), gates);
  silu_gate(gates, gated, n, d.intermediate);
  multiply(gated, n, d.down, middle, out);
  for (int64_t i = 0; i < n; ++i) rms_norm_row(out + i * d.hidden, d.of_head, normed + i * d.hidden, d.hidden, d.eps);
  multiply(normed, n, d.head, static_cast<const T*>(nullptr), logits);
}

}  // namespace
