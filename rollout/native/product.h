// Products with a policy's weights on the processor's matrix units (AMX), for the few rows of a decode step.
//
// Weights are packed once as the tiles that the units take, in the order in which they are read. A product therefore
// reads them once, in one stream per core, whether it has one row or a hundred. Every row is summed in the same order
// regardless of the number of rows, so that a sequence's logits do not depend on the other sequences in the batch.
#pragma once

#include <omp.h>

#include "product_blocks.h"
#include "product_rows.h"
#include "tiles.h"

#ifdef PACELINE_TILES

namespace {

constexpr int64_t kStepsAhead = 16;      // prefetch distance in steps of 2 KB

struct alignas(64) TileLine {
  bfloat16 values[kStep];
};

// Does what pack_weight_rows does, a tile at a time.
inline void pack_weight(const bfloat16* weight, int64_t outputs, int64_t inputs, bfloat16* packed) {
#pragma omp parallel for
  for (int64_t n = 0; n < outputs; n += kTileRows)
    for (int64_t k = 0; k < inputs; k += kStep) {
      __m512i lines[kTileRows];
      for (int64_t r = 0; r < kTileRows; ++r) lines[r] = _mm512_loadu_si512(weight + (n + r) * inputs + k);
      transpose(lines);
      bfloat16* tile = packed + n / kPanel * kPanel * inputs + k / kStep * kPanelStep + n % kPanel * kStep;
      for (int64_t r = 0; r < kTileRows; ++r) _mm512_storeu_si512(tile + r * kStep, lines[r]);
    }
}

// Computes one panel's outputs of 16 or 32 rows as float32 [kBlocks][2][16][16].
template <int kBlocks>
void panel_product(const TileLine* x, int64_t steps, const bfloat16* panel, bool first, float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kBlocks == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < steps; ++k) {
    const bfloat16* tiles = panel + k * kPanelStep;
    if (first)
      for (int64_t line = 0; line < kPanelStep; line += kStep) __builtin_prefetch(tiles + kStepsAhead * kPanelStep + line, 0, 2);
    _tile_loadd(6, tiles, 64);
    _tile_loadd(7, tiles + kPanelStep / 2, 64);
    _tile_loadd(4, x + k * kTileRows, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kBlocks == 2) {
      _tile_loadd(5, x + (steps + k) * kTileRows, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  if constexpr (kBlocks == 2) {
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
  }
}

// Adds bias and residual to rows `begin` to `end` of the outputs from n on, and rounds to bfloat16.
inline void write_panel(const float* sums, int64_t begin, int64_t end, int64_t n, int64_t outputs, const bfloat16* bias,
                        const bfloat16* residual, bfloat16* out) {
  for (int64_t row = begin; row < end; ++row) {
    const float* low = sums + (row - begin) / kTileRows * 512 + (row - begin) % kTileRows * kLanes;
    Floats left = load(low), right = load(low + 256);
    if (bias != nullptr) left += load(bias + n), right += load(bias + n + kLanes);
    const int64_t at = row * outputs + n;
    if (residual != nullptr) left += load(residual + at), right += load(residual + at + kLanes);
    _mm512_storeu_si512(out + at, (__m512i)_mm512_cvtne2ps_pbh((__m512)right, (__m512)left));
  }
}

// Computes out = x weight^T, plus a bias [outputs] and a residual [rows, outputs] if they are not null.
inline void multiply_packed(const bfloat16* x, int64_t rows, const bfloat16* packed, int64_t outputs, int64_t inputs,
                            const bfloat16* bias, const bfloat16* residual, bfloat16* out) {
  const int64_t blocks = (rows + kTileRows - 1) / kTileRows, steps = inputs / kStep;
  // if there are many panels, adjacent ones run together, so that a row's outputs fill its page before the next row's
  const int64_t panels = outputs / kPanel, group = std::clamp<int64_t>(panels / (8 * omp_get_max_threads()), 1, 8);
  static thread_local std::vector<TileLine> lines_of_thread;
  if (static_cast<int64_t>(lines_of_thread.size()) < blocks * steps * kTileRows) lines_of_thread.resize(blocks * steps * kTileRows);
  TileLine* lines = lines_of_thread.data();
#pragma omp parallel
  {
    const TileShapes shapes;
    alignas(64) float sums[4 * 256];
#pragma omp for
    for (int64_t row = 0; row < blocks * kTileRows; ++row)
      for (int64_t k = 0; k < steps; ++k) {
        TileLine* line = lines + (row / kTileRows * steps + k) * kTileRows + row % kTileRows;
        if (row < rows)
          std::memcpy(line, x + row * inputs + k * kStep, sizeof *line);
        else
          std::memset(line, 0, sizeof *line);
      }
#pragma omp for
    for (int64_t g = 0; g < panels; g += group)
      for (int64_t block = 0; block < blocks; block += 2)
        for (int64_t panel = g; panel < std::min(panels, g + group); ++panel) {
          const TileLine* block_lines = lines + block * steps * kTileRows;
          const bfloat16* weights = packed + panel * kPanel * inputs;
          if (block + 1 < blocks)
            panel_product<2>(block_lines, steps, weights, block == 0, sums);
          else
            panel_product<1>(block_lines, steps, weights, block == 0, sums);
          const int64_t begin = block * kTileRows;
          write_panel(sums, begin, std::min(rows, begin + 2 * kTileRows), panel * kPanel, outputs, bias, residual, out);
        }
  }
}

}  // namespace

#endif

namespace {

// Multiplies on matrix units where there are any, else on vector units.
inline void multiply_packed_any(const bfloat16* x, int64_t rows, const bfloat16* packed, int64_t outputs, int64_t inputs,
                                const bfloat16* bias, const bfloat16* residual, bfloat16* out) {
#ifdef PACELINE_TILES
  if (tiles_granted()) return multiply_packed(x, rows, packed, outputs, inputs, bias, residual, out);
#endif
  if (!kWide && rows >= kBlocksFrom) return multiply_blocks(x, rows, packed, outputs, inputs, bias, residual, out);
  multiply_rows(x, rows, packed, outputs, inputs, bias, residual, out);
}

}  // namespace
