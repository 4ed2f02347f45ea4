// Products of an update's backward pass, with the blocks of `pack_weight_rows`.
//
// The gradient of a layer's input multiplies by the transposed weight, which is packed like any other weight. The
// gradient of its weight is a product of two activations over the tokens: both are packed in pairs of tokens, so that
// neither is transposed in memory.
#pragma once

#include <omp.h>

#include "product.h"
#include "product_blocks.h"

namespace {

constexpr int kGradientRows = 8;         // rows of a weight's gradient whose sums fit into the registers of AVX-512
constexpr int64_t kPanelsTogether = 16;  // panels of rows or columns in one work item

// Returns 16 pairs of numbers from two rows; a row past the end is null and counts as zeros.
inline Words pair_of_rows(const bfloat16* low, const bfloat16* high) {
  const Words pairs = low == nullptr ? Words{} : load_halves(low);
  return high == nullptr ? pairs : pairs | load_halves(high) << 16;
}

// Packs the transpose of a matrix [rows, columns] as `pack_weight_rows` packs a weight [columns, padded rows]. The rows
// are padded with zeros to whole blocks.
inline void pack_transposed(const bfloat16* matrix, int64_t rows, int64_t columns, bfloat16* packed) {
  const int64_t steps = (rows + kStep - 1) / kStep;
#pragma omp parallel for
  for (int64_t n = 0; n < columns; n += kPanel)
    for (int64_t step = 0; step < steps; ++step) {
      bfloat16* block = packed + (n / kPanel * steps + step) * kPanelStep;
      for (int64_t pair = 0; pair < kStep / 2; ++pair) {
        const int64_t row = step * kStep + 2 * pair;
        const bfloat16* low = row < rows ? matrix + row * columns + n : nullptr;
        const bfloat16* high = row + 1 < rows ? low + columns : nullptr;
        for (int64_t half = 0; half < 2; ++half) {
          const Words pairs = pair_of_rows(low == nullptr ? low : low + half * kLanes, high == nullptr ? high : high + half * kLanes);
          std::memcpy(block + (half * kStep / 2 + pair) * kStep, &pairs, sizeof pairs);
        }
      }
    }
}

// Adds sums over `steps` blocks of pairs to kGradientRows rows of one panel. `rows` points at the pairs of the first row
// in the first block.
inline void gradient_rows(const bfloat16* rows, const bfloat16* panel, int64_t steps, int64_t columns, float* out) {
  FloatPart sums[kGradientRows][2][kParts] = {};
  for (int64_t step = 0; step < steps; ++step) {
    const bfloat16 *pairs = rows + step * kPanelStep, *block = panel + step * kPanelStep;
#pragma GCC unroll 4
    for (int64_t pair = 0; pair < kStep / 2; ++pair)
      for (int r = 0; r < kGradientRows; ++r) {
        uint32_t two;
        std::memcpy(&two, pairs + pair * kStep + 2 * r, sizeof two);
        add_pairs(sums[r], block + pair * kStep, two);
      }
  }
  for (int r = 0; r < kGradientRows; ++r) {
    float* target = out + r * columns;
    store(target, load(target) + joined(sums[r][0])), store(target + kLanes, load(target + kLanes) + joined(sums[r][1]));
  }
}

// Adds Σ_t left[t, i] right[t, j] to out[i, j], in float32, from the packed transposes of left and right.
inline void gradient_on_vectors(const bfloat16* left, int64_t rows, const bfloat16* right, int64_t columns, int64_t steps, float* out) {
  const int64_t groups = (rows / kPanel + kPanelsTogether - 1) / kPanelsTogether, panels = columns / kPanel;
#pragma omp parallel for schedule(dynamic)
  for (int64_t item = 0; item < groups * panels; ++item) {
    const int64_t n = item % panels * kPanel, end = std::min(rows, (item / panels + 1) * kPanelsTogether * kPanel);
    for (int64_t row = item / panels * kPanelsTogether * kPanel; row < end; row += kGradientRows) {
      const float* next = out + (row + kGradientRows) * columns + n;
      for (int r = 0; r < kGradientRows; ++r)
        __builtin_prefetch(next + r * columns, 1, 2), __builtin_prefetch(next + r * columns + kLanes, 1, 2);
      const int64_t in_panel = row % kPanel;
      const bfloat16* pairs = left + row / kPanel * steps * kPanelStep + in_panel / kLanes * kPanelStep / 2 + in_panel % kLanes * 2;
      gradient_rows(pairs, right + n * steps * kStep, steps, columns, out + row * columns + n);
    }
  }
}

// Converts tokens `token` to `token` + depth of rows `begin` and following, which lie as `pack_transposed` left them, to
// floats [groups, kDepth, kBlockRows].
inline void unpack_groups(const bfloat16* packed, int64_t begin, const RowGroups& groups, int64_t steps, int64_t token, int64_t depth, float* out) {
  alignas(64) float values[kDepth * kLanes];
  for (int64_t first = 0; first < groups.rows; first += kLanes) {
    const int64_t row = begin + first, end = first + kLanes;
    unpack_panel(packed + row / kPanel * steps * kPanelStep + row % kPanel * kStep, token, depth, values);
    for (int64_t group = 0; group < groups.count; ++group)
      for (int64_t r = std::max(first, groups.first(group)); r < std::min(end, groups.first(group + 1)); ++r)
        for (int64_t k = 0; k < depth; ++k)
          out[(group * kDepth + k) * kBlockRows + r - groups.first(group)] = values[k * kLanes + r - first];
  }
}

// Does what gradient_on_vectors does, with activations that are converted to float32 a block at a time.
inline void gradient_in_blocks(const bfloat16* left, int64_t rows, const bfloat16* right, int64_t columns, int64_t steps, float* out) {
  constexpr int64_t kColumnsTogether = kPanelsTogether * kPanel;
  const int64_t across = (columns + kColumnsTogether - 1) / kColumnsTogether, down = (rows + kRowsTogether - 1) / kRowsTogether;
#pragma omp parallel
  {
    alignas(64) float values[kDepth * kLanes];
    std::vector<float> floats((kRowsTogether + kBlockRows) * kDepth);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < down * across; ++item) {
      const int64_t begin = item / across * kRowsTogether, column = item % across * kColumnsTogether;
      const RowGroups groups{std::min(kRowsTogether, rows - begin)};
      for (int64_t token = 0; token < steps * kStep; token += kDepth) {
        const int64_t depth = std::min(kDepth, steps * kStep - token);
        unpack_groups(left, begin, groups, steps, token, depth, floats.data());
        for (int64_t n = column; n < std::min(columns, column + kColumnsTogether); n += kLanes) {
          unpack_panel(right + n / kPanel * steps * kPanelStep + n % kPanel * kStep, token, depth, values);
          for (int64_t group = 0; group < groups.count; ++group) {
            float* sums = out + (begin + groups.first(group)) * columns + n;
            for (int64_t r = 0; r < kBlockRows; ++r) __builtin_prefetch(sums + (groups.size(group) + r) * columns, 1, 2);
            add_rows(groups.size(group), floats.data() + group * kDepth * kBlockRows, values, depth, sums, columns);
          }
        }
      }
    }
  }
}

#ifdef PACELINE_TILES

// Does what gradient_on_vectors does, on matrix units.
inline void gradient_on_tiles(const bfloat16* left, int64_t rows, const bfloat16* right, int64_t columns, int64_t steps, float* out) {
#pragma omp parallel
  {
    const TileShapes shapes;
    alignas(64) float sums[4 * 256];
    std::vector<TileLine> lines(2 * steps * kTileRows);
#pragma omp for schedule(dynamic)
    for (int64_t row = 0; row < rows; row += kPanel) {
      for (int64_t half = 0; half < 2; ++half)
        for (int64_t step = 0; step < steps; ++step) {
          __m512i pairs[kTileRows];
          const bfloat16* block = left + (row / kPanel * steps + step) * kPanelStep + half * kPanelStep / 2;
          for (int64_t pair = 0; pair < kTileRows; ++pair) pairs[pair] = _mm512_loadu_si512(block + pair * kStep);
          transpose(pairs);
          for (int64_t r = 0; r < kTileRows; ++r) _mm512_store_si512(lines[(half * steps + step) * kTileRows + r].values, pairs[r]);
        }
      for (int64_t n = 0; n < columns; n += kPanel) {
        panel_product<2>(lines.data(), steps, right + n * steps * kStep, false, sums);
        for (int64_t r = 0; r < kPanel; ++r) {
          const float* low = sums + r / kTileRows * 512 + r % kTileRows * kLanes;
          float* target = out + (row + r) * columns + n;
          store(target, load(target) + load(low)), store(target + kLanes, load(target + kLanes) + load(low + 256));
        }
      }
    }
  }
}

#endif

// Adds to out [rows, columns] what gradient_on_vectors does, on the machine's fastest units.
inline void weight_gradient(const bfloat16* left, int64_t rows, const bfloat16* right, int64_t columns, int64_t steps, float* out) {
#ifdef PACELINE_TILES
  if (tiles_granted()) return gradient_on_tiles(left, rows, right, columns, steps, out);
#endif
  if (!kWide) return gradient_in_blocks(left, rows, right, columns, steps, out);
  gradient_on_vectors(left, rows, right, columns, steps, out);
}

}  // namespace
