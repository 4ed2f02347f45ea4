// Token-wise operations of a decoder layer: norms, gates and rotations.
#pragma once

#include "lanes.h"

namespace {

template <typename T>
void rms_norm_row(const T* x, const T* gain, T* out, int64_t width, float eps) {
  Floats squares = {};
  for (int64_t i = 0; i < width; i += kLanes) {
    const Floats v = load(x + i);
    squares += v * v;
  }
  const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + eps);
  for (int64_t i = 0; i < width; i += kLanes) store(out + i, load(x + i) * scale * load(gain + i));
}

template <typename T>
void rms_norm(const T* x, const T* gain, T* out, int64_t rows, int64_t width, float eps) {
#pragma omp parallel for if (rows * width > kSerialWork)
  for (int64_t r = 0; r < rows; ++r) rms_norm_row(x + r * width, gain, out + r * width, width, eps);
}

template <typename T>
void silu_gate(const T* x, T* out, int64_t rows, int64_t width) {
#pragma omp parallel for if (rows * width > kSerialWork)
  for (int64_t r = 0; r < rows; ++r) {
    const T* gate = x + r * 2 * width;
    for (int64_t i = 0; i < width; i += kLanes) {
      const Floats g = load(gate + i);
      store(out + r * width + i, g / (exponential(-g) + 1.0f) * load(gate + width + i));
    }
  }
}

// Normalizes one head if there is a gain, then rotates its halves by the position's angle.
template <typename T>
void rotate_head(const T* head, const T* gain, float eps, const T* cosines, const T* sines, T* out, int64_t dim) {
  alignas(64) float x[kMaxDim], c[kMaxDim], s[kMaxDim];
  Floats squares = {};
  for (int64_t i = 0; i < dim; i += kLanes) {
    const Floats v = load(head + i);
    squares += v * v;
    store(x + i, v);
    store(c + i, load(cosines + i));
    store(s + i, load(sines + i));
  }
  if (gain != nullptr) {
    const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(dim) + eps);
    for (int64_t i = 0; i < dim; i += kLanes) store(x + i, load(x + i) * scale * load(gain + i));
  }
  const int64_t half = dim / 2;
  alignas(64) float y[kMaxDim];
  for (int64_t i = 0; i < half; ++i) {
    y[i] = x[i] * c[i] - x[i + half] * s[i];
    y[i + half] = x[i + half] * c[i + half] + x[i] * s[i + half];
  }
  for (int64_t i = 0; i < dim; i += kLanes) store(out + i, load(y + i));
}

}  // namespace
