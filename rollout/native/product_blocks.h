// Products of four rows and more on vector units narrower than AVX-512's.
//
// Converting weights from bfloat16 takes as many instructions as multiplying them by two rows. Here a block of weights
// and all rows are converted to float32 once; the sums of a few rows at a time then stay in registers while the block is
// multiplied. Each output is summed in the order of `multiply_rows`, so that its bits are the same.
#pragma once

#include <omp.h>

#include "product_rows.h"

namespace {

constexpr int kBlockRows = (kRegisters - 1) / kParts - 1;  // their sums fit into registers, beside weights and an input
constexpr int64_t kBlocksFrom = 4;                         // fewer rows do not pay for converting the weights
constexpr int64_t kDepth = 256;                            // inputs of a block of weights: 16 KB, for the first cache
constexpr int64_t kDepthFrom = 33;                         // with fewer rows, a block must be small to be read ahead
constexpr int64_t kRowsTogether = 96;                      // rows whose inputs the second cache keeps

// Adds to sums [kRows, 16], whose rows are `stride` apart, the products of kRows columns of x [depth, kBlockRows] and
// weights [depth, 16].
template <int kRows>
void add_block(const float* x, const float* weights, int64_t depth, float* sums, int64_t stride) {
  FloatPart totals[kRows][kParts];
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kParts; ++p) totals[r][p] = load_part(sums + r * stride + p * kPartLanes);
  for (int64_t k = 0; k < depth; ++k) {
    FloatPart line[kParts];
    for (int p = 0; p < kParts; ++p) line[p] = load_part(weights + k * kLanes + p * kPartLanes);
    for (int r = 0; r < kRows; ++r) {
      const FloatPart input = x[k * kBlockRows + r] - FloatPart{};  // minus zero is a copy, plus zero an addition
      for (int p = 0; p < kParts; ++p) totals[r][p] += line[p] * input;
    }
  }
  for (int r = 0; r < kRows; ++r) std::memcpy(sums + r * stride, totals[r], sizeof totals[r]);
}

// Calls `add_block` for 1 to kBlockRows rows.
template <int kRows = kBlockRows>
void add_rows(int64_t rows, const float* x, const float* weights, int64_t depth, float* sums, int64_t stride) {
  if constexpr (kRows > 1)
    if (rows < kRows) return add_rows<kRows - 1>(rows, x, weights, depth, sums, stride);
  add_block<kRows>(x, weights, depth, sums, stride);
}

// Converts the pairs [pairs, 16, 2] to floats [2 pairs, 16].
inline void unpack_pairs(const bfloat16* packed, int64_t pairs, float* out) {
  for (int64_t i = 0; i < pairs; ++i)
    for (int p = 0; p < kParts; ++p) {
      WordPart words;
      std::memcpy(&words, packed + (i * kLanes + p * kPartLanes) * 2, sizeof words);
      store_part(out + 2 * i * kLanes + p * kPartLanes, (FloatPart)(words << 16));
      store_part(out + (2 * i + 1) * kLanes + p * kPartLanes, (FloatPart)(words & 0xffff0000u));
    }
}

// Converts inputs `first` to `first` + depth of 16 outputs of a panel to floats [depth, 16], and prefetches weights that
// follow. `panel` points at those outputs in the panel's first step.
inline void unpack_panel(const bfloat16* panel, int64_t first, int64_t depth, float* out) {
  for (int64_t k = 0; k < depth; k += kStep) {
    const bfloat16* block = panel + (first + k) / kStep * kPanelStep;
    for (int64_t line = 0; line < kPanelStep / 2; line += 32) __builtin_prefetch(block + kRowStepsAhead * kPanelStep + line, 0, 2);
    unpack_pairs(block, kStep / 2, out + k * kLanes);
  }
}

// Rows in groups of nearly equal size, of at most kBlockRows.
struct RowGroups {
  int64_t rows, count = (rows + kBlockRows - 1) / kBlockRows;

  int64_t first(int64_t group) const { return rows * group / count; }
  int64_t size(int64_t group) const { return first(group + 1) - first(group); }
};

// Converts `count` rows [inputs] to floats [inputs, kBlockRows].
inline void convert_group(const bfloat16* x, int64_t count, int64_t inputs, float* out) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t k = 0; k < inputs; ++k) out[k * kBlockRows + r] = to_float(x[r * inputs + k]);
}

// Computes one panel's outputs of all rows as float32 [rows, 32], from the converted groups.
inline void panel_in_blocks(const float* floats, const RowGroups& groups, int64_t inputs, const bfloat16* panel, float* out) {
  alignas(64) float weights[kDepth * kLanes];
  const int64_t most = groups.rows >= kDepthFrom ? kDepth : kStep;
  std::fill(out, out + groups.rows * kPanel, 0.0f);
  for (int64_t k = 0; k < inputs; k += most)
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t depth = std::min(most, inputs - k);
      unpack_panel(panel + half * kPanelStep / 2, k, depth, weights);
      for (int64_t group = 0; group < groups.count; ++group)
        add_rows(groups.size(group), floats + (group * inputs + k) * kBlockRows, weights, depth,
                 out + groups.first(group) * kPanel + half * kLanes, kPanel);
    }
}

// Computes out = x weight^T, plus a bias [outputs] and a residual [rows, outputs] if they are not null, of at most
// kRowsTogether rows.
inline void multiply_block_rows(const bfloat16* x, int64_t rows, const bfloat16* packed, int64_t outputs, int64_t inputs,
                                const bfloat16* bias, const bfloat16* residual, bfloat16* out) {
  const RowGroups groups{rows};
  static thread_local std::vector<float> floats_of_thread;
  const size_t size = groups.count * inputs * kBlockRows;
  if (floats_of_thread.size() < size) floats_of_thread.resize(size);
  float* floats = floats_of_thread.data();
#pragma omp parallel
  {
    alignas(64) float sums[kRowsTogether * kPanel];
#pragma omp for
    for (int64_t group = 0; group < groups.count; ++group)
      convert_group(x + groups.first(group) * inputs, groups.size(group), inputs, floats + group * inputs * kBlockRows);
#pragma omp for
    for (int64_t n = 0; n < outputs; n += kPanel) {
      panel_in_blocks(floats, groups, inputs, packed + n * inputs, sums);
      for (int64_t row = 0; row < rows; ++row) write_row(sums + row * kPanel, row * outputs + n, n, bias, residual, out);
    }
  }
}

// Does what multiply_block_rows does for any number of rows, in pieces of nearly equal size.
inline void multiply_blocks(const bfloat16* x, int64_t rows, const bfloat16* packed, int64_t outputs, int64_t inputs,
                            const bfloat16* bias, const bfloat16* residual, bfloat16* out) {
  const int64_t pieces = (rows + kRowsTogether - 1) / kRowsTogether;
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t row = rows * piece / pieces, end = rows * (piece + 1) / pieces;
    multiply_block_rows(x + row * inputs, end - row, packed, outputs, inputs, bias,
                        residual == nullptr ? nullptr : residual + row * outputs, out + row * outputs);
  }
}

}  // namespace
