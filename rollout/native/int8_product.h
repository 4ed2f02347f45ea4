// Products with 8-bit weights. A product of a few rows is bound by reading weights, so half the bytes take half the time.
#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "vectors.h"

namespace {

constexpr int64_t kGroup = 64;  // inputs that share a scale, and bytes in a vector

// A matrix [outputs, inputs] with one scale per row; 128 is added to every weight to make it unsigned.
struct Quantized {
  const uint8_t* weights;
  const float* scales;
  int64_t outputs, inputs;
};

#if defined(__AVX2__) && !defined(__AVX512VNNI__)

typedef int16_t Input;      // widened once, so that a product of 16 pairs is one instruction
constexpr int kOutputs = 2;  // with four rows, as many sums as 16 registers hold

inline void store_inputs(int16_t* p, Ints q) {
  for (int64_t lane = 0; lane < kLanes; ++lane) p[lane] = static_cast<int16_t>(q[lane]);
}

#else

typedef int8_t Input;
constexpr int kOutputs = 4;

inline void store_inputs(int8_t* p, Ints q) { store_bytes(p, q); }

#endif

// Inputs in 8 bits, with one scale for every 64. `shift` is what the 128 added to the weights contributes to each row's
// products.
struct Activations {
  std::vector<Input> values;
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
        store_inputs(values.data() + g * kGroup + i, q);
      }
      int32_t total = 0;
      for (int64_t i = 0; i < kLanes; ++i) total += totals[i];
      scales[g] = scale;
      shift[g * kGroup / inputs] += 128.0f * scale * static_cast<float>(total);
    }
  }
};

#if defined(__AVX2__) && !defined(__AVX512VNNI__)

// Multiplies kRows rows of inputs, from `row` on, by kOutputs rows of weights. Each sum has 8 lanes and is added up in
// the order of the groups, whatever kRows is.
template <int kRows, typename T>
void dot_block(const Activations& x, int64_t row, const Quantized& w, int64_t first, const T* residual, T* out) {
  const int64_t inputs = w.inputs, groups = inputs / kGroup;
  const uint8_t* weights = w.weights + first * inputs;
  const int16_t* values = x.values.data() + row * inputs;
  const float* scales = x.scales.data() + row * groups;
  __m256 sums[kRows][kOutputs];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int o = 0; o < kOutputs; ++o) sums[r][o] = _mm256_setzero_ps();
  for (int64_t g = 0; g < groups; ++g, weights += kGroup, values += kGroup, ++scales) {
#pragma GCC unroll 2
    for (int o = 0; o < kOutputs; ++o) {
      const __m128i* weight = reinterpret_cast<const __m128i*>(weights + o * inputs);
      const __m256i w0 = _mm256_cvtepu8_epi16(_mm_loadu_si128(weight)), w1 = _mm256_cvtepu8_epi16(_mm_loadu_si128(weight + 1));
      const __m256i w2 = _mm256_cvtepu8_epi16(_mm_loadu_si128(weight + 2)), w3 = _mm256_cvtepu8_epi16(_mm_loadu_si128(weight + 3));
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const __m256i* input = reinterpret_cast<const __m256i*>(values + r * inputs);
        const __m256i a = _mm256_add_epi32(_mm256_madd_epi16(w0, _mm256_loadu_si256(input)),
                                           _mm256_madd_epi16(w1, _mm256_loadu_si256(input + 1)));
        const __m256i b = _mm256_add_epi32(_mm256_madd_epi16(w2, _mm256_loadu_si256(input + 2)),
                                           _mm256_madd_epi16(w3, _mm256_loadu_si256(input + 3)));
        const __m256 total = _mm256_cvtepi32_ps(_mm256_add_epi32(a, b));
        sums[r][o] = _mm256_fmadd_ps(total, _mm256_broadcast_ss(scales + r * groups), sums[r][o]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int o = 0; o < kOutputs; ++o) {
      alignas(32) float lanes[8];
      _mm256_store_ps(lanes, sums[r][o]);
      const float total = ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
      const int64_t at = (row + r) * w.outputs + first + o;
      const float value = (total - x.shift[row + r]) * w.scales[first + o];
      out[at] = from_float<T>(value + (residual != nullptr ? to_float(residual[at]) : 0.0f));
    }
}

#else

// Returns 16 sums of four products each, of a group's 64 bytes of weights and inputs.
inline Ints dot_group(const uint8_t* w, const int8_t* x) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(w), _mm512_loadu_si512(x));
#else
  int32_t lanes[kLanes] = {};
  for (int64_t i = 0; i < kGroup; ++i) lanes[i / 4] += static_cast<int32_t>(w[i]) * x[i];
  Ints sums;
  std::memcpy(&sums, lanes, sizeof sums);
  return sums;
#endif
}

// Multiplies kRows rows of inputs, from `row` on, by kOutputs rows of weights.
template <int kRows, typename T>
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

#endif

// Multiplies x [rows, inputs] by the matrix and adds the residual if it is not null; out is [rows, outputs].
template <typename T>
void multiply(const T* x, int64_t rows, const Quantized& w, const T* residual, T* out) {
  static thread_local Activations activations_of_thread;
  Activations& activations = activations_of_thread;
  activations.read(x, rows, w.inputs);
#pragma omp parallel for
  for (int64_t first = 0; first < w.outputs; first += kOutputs) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) dot_block<4>(activations, r, w, first, residual, out);
    if (rows - r == 3) dot_block<3>(activations, r, w, first, residual, out);
    if (rows - r == 2) dot_block<2>(activations, r, w, first, residual, out);
    if (rows - r == 1) dot_block<1>(activations, r, w, first, residual, out);
  }
}

}  // namespace
