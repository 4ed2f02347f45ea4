// Products with weights as they lie in memory, for float32 and for shapes that are not whole panels.
//
// An output is a dot product of a row and a row of the weight: 16 partial sums in the order of the inputs, which are
// then added in a fixed order. It is the same bits whatever rows stand beside it, and the trainer's weights need no copy.
#pragma once

#include <omp.h>

#include "lanes.h"

namespace {

constexpr int kDotRows = kWide ? 3 : 2, kDotOutputs = kWide ? 8 : 3;  // their dot products fit into the registers

// Loads the first `count` of 16 values; the others are 0.
template <typename T>
Floats load_first(const T* p, int64_t count) {
  T values[kLanes] = {};
  std::memcpy(values, p, count * sizeof(T));
  return load(values);
}

// Computes the dot products of kRows rows of x and kOutputs rows of a weight.
template <typename T, int kRows, int kOutputs>
void dot_products(const T* x, const T* weight, int64_t inputs, float out[kRows][kOutputs]) {
  FloatPart sums[kRows][kOutputs][kParts] = {};
  const int64_t whole = inputs / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes)
    for (int p = 0; p < kParts; ++p) {
      const int64_t at = k + p * kPartLanes;
      FloatPart weights[kOutputs];
      for (int o = 0; o < kOutputs; ++o) weights[o] = load_part(weight + o * inputs + at);
      for (int r = 0; r < kRows; ++r) {
        const FloatPart values = load_part(x + r * inputs + at);
        for (int o = 0; o < kOutputs; ++o) sums[r][o][p] += values * weights[o];
      }
    }
  for (int r = 0; r < kRows; ++r)
    for (int o = 0; o < kOutputs; ++o) {
      Floats total = joined(sums[r][o]);
      if (whole < inputs)
        total += load_first(x + r * inputs + whole, inputs - whole) * load_first(weight + o * inputs + whole, inputs - whole);
      out[r][o] = sum(total);
    }
}

// The operands of a product: out = x weight^T, plus a bias [outputs] and a residual if they are not null. Rows of the
// residual and of the output are `stride` elements apart.
template <typename T>
struct DotOperands {
  const T *x, *weight, *bias, *residual;
  T* out;
  int64_t inputs, stride;
};

// Computes outputs n to n + kOutputs of kRows rows.
template <typename T, int kRows, int kOutputs>
void dot_block(const DotOperands<T>& p, int64_t row, int64_t n) {
  float sums[kRows][kOutputs];
  dot_products<T, kRows, kOutputs>(p.x + row * p.inputs, p.weight + n * p.inputs, p.inputs, sums);
  for (int r = 0; r < kRows; ++r)
    for (int o = 0; o < kOutputs; ++o) {
      const int64_t at = (row + r) * p.stride + n + o;
      float value = sums[r][o];
      if (p.bias != nullptr) value += to_float(p.bias[n + o]);
      if (p.residual != nullptr) value += to_float(p.residual[at]);
      p.out[at] = from_float<T>(value);
    }
}

// Computes outputs n to n + kOutputs of all rows.
template <typename T, int kOutputs>
void dot_rows(const DotOperands<T>& p, int64_t rows, int64_t n) {
  int64_t row = 0;
  for (; row + kDotRows <= rows; row += kDotRows) dot_block<T, kDotRows, kOutputs>(p, row, n);
  for (; row < rows; ++row) dot_block<T, 1, kOutputs>(p, row, n);
}

// Computes all outputs of all rows.
template <typename T>
void multiply_dots(const DotOperands<T>& p, int64_t rows, int64_t outputs) {
  const int64_t blocks = (outputs + kDotOutputs - 1) / kDotOutputs;
#pragma omp parallel for if (rows * outputs * p.inputs > 16 * kSerialWork)
  for (int64_t block = 0; block < blocks; ++block) {
    int64_t n = block * kDotOutputs;
    const int64_t end = std::min(outputs, n + kDotOutputs);
    if (end - n == kDotOutputs)
      dot_rows<T, kDotOutputs>(p, rows, n);
    else
      for (; n < end; ++n) dot_rows<T, 1>(p, rows, n);
  }
}

}  // namespace
