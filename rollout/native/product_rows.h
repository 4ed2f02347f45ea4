// Products with a policy's weights on vector units, for processors without matrix units.
//
// Weights are packed as for matrix units (product.h). A row's output is one sum in the order of the inputs, whether it
// is computed alone or with eleven others, so that no row depends on another by a bit.
#pragma once

#include <omp.h>

#include "lanes.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kPanel = 32;         // outputs computed together: two vectors, or two tiles
constexpr int64_t kStep = 32;          // inputs of a packed block, or of a tile
constexpr int64_t kPanelStep = kPanel * kStep;
constexpr int kMostRows = kWide ? 12 : 2;  // rows whose sums fit into the registers
constexpr int64_t kRowStepsAhead = 8;  // prefetch distance in blocks of 2 KB

// Reorders a weight [outputs, inputs] as [outputs / 32][inputs / 32][2][16 pairs of inputs][16 outputs][2].
inline void pack_weight_rows(const bfloat16* weight, int64_t outputs, int64_t inputs, bfloat16* packed) {
#pragma omp parallel for
  for (int64_t n = 0; n < outputs; n += kLanes)
    for (int64_t k = 0; k < inputs; k += kStep) {
      bfloat16* block = packed + n / kPanel * kPanel * inputs + k / kStep * kPanelStep + n % kPanel * kStep;
      for (int64_t pair = 0; pair < kStep / 2; ++pair)
        for (int64_t lane = 0; lane < kLanes; ++lane)
          std::memcpy(block + (pair * kLanes + lane) * 2, weight + (n + lane) * inputs + k + 2 * pair, 2 * sizeof(bfloat16));
    }
}

// Adds the products of a pair of inputs and of a pair of weights for each lane.
inline FloatPart add_pair(FloatPart sums, const bfloat16* weights, uint32_t inputs) {
#ifdef __AVX512BF16__
  return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_loadu_si512(weights), (__m512bh)_mm512_set1_epi32(inputs));
#else
  WordPart w;
  std::memcpy(&w, weights, sizeof w);
  sums += (FloatPart)(w << 16) * to_float(bfloat16{static_cast<uint16_t>(inputs)});
  return sums + (FloatPart)(w & 0xffff0000u) * to_float(bfloat16{static_cast<uint16_t>(inputs >> 16)});
#endif
}

// Adds the products of a pair of inputs and of 32 pairs of weights, the first of which are at `block`, to 32 sums.
inline void add_pairs(FloatPart (*sums)[kParts], const bfloat16* block, uint32_t inputs) {
  for (int half = 0; half < 2; ++half)
    for (int p = 0; p < kParts; ++p)
      sums[half][p] = add_pair(sums[half][p], block + half * kPanelStep / 2 + 2 * p * kPartLanes, inputs);
}

// Computes one panel's outputs of kRows rows as float32 [kRows][32].
template <int kRows>
void panel_of_rows(const bfloat16* x, int64_t inputs, const bfloat16* panel, bool first, float* out) {
  FloatPart sums[kRows][2][kParts] = {};
  for (int64_t k = 0; k < inputs / kStep; ++k) {
    const bfloat16* block = panel + k * kPanelStep;
    if (first)
      for (int64_t line = 0; line < kPanelStep; line += 32) __builtin_prefetch(block + kRowStepsAhead * kPanelStep + line, 0, 2);
#pragma GCC unroll 4
    for (int64_t pair = 0; pair < kStep / 2; ++pair)
      for (int r = 0; r < kRows; ++r) {
        uint32_t two;
        std::memcpy(&two, x + r * inputs + k * kStep + 2 * pair, sizeof two);
        add_pairs(sums[r], block + pair * 32, two);
      }
  }
  std::memcpy(out, sums, sizeof sums);
}

// Calls `panel_of_rows` for 1 to kMostRows rows.
template <int kRows = kMostRows>
void panel_of(const bfloat16* x, int64_t rows, int64_t inputs, const bfloat16* panel, bool first, float* out) {
  if constexpr (kRows > 1)
    if (rows < kRows) return panel_of<kRows - 1>(x, rows, inputs, panel, first, out);
  panel_of_rows<kRows>(x, inputs, panel, first, out);
}

// Adds bias and residual to a panel's outputs of one row and rounds them to bfloat16.
inline void write_row(const float* sums, int64_t at, int64_t n, const bfloat16* bias, const bfloat16* residual, bfloat16* out) {
  for (int64_t half = 0; half < kPanel; half += kLanes) {
    Floats value = load(sums + half);
    if (bias != nullptr) value += load(bias + n + half);
    if (residual != nullptr) value += load(residual + at + half);
    store(out + at + half, value);
  }
}

// Computes out = x weight^T, plus a bias [outputs] and a residual [rows, outputs] if they are not null.
inline void multiply_rows(const bfloat16* x, int64_t rows, const bfloat16* packed, int64_t outputs, int64_t inputs, const bfloat16* bias,
                          const bfloat16* residual, bfloat16* out) {
#pragma omp parallel for
  for (int64_t n = 0; n < outputs; n += kPanel) {
    alignas(64) float sums[kMostRows * kPanel];
    const bfloat16* panel = packed + n * inputs;
    // blocks of nearly equal size, because a block of one or two rows waits for its own sums
    const int64_t blocks = (rows + kMostRows - 1) / kMostRows;
    for (int64_t b = 0, row = 0; b < blocks; ++b) {
      const int64_t count = (rows - row + blocks - b - 1) / (blocks - b);
      panel_of(x + row * inputs, count, inputs, panel, b == 0, sums);
      for (int64_t r = 0; r < count; ++r, ++row) write_row(sums + r * kPanel, row * outputs + n, n, bias, residual, out);
    }
  }
}

}  // namespace
