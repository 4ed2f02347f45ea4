// Loads, stores, sums and exponentials of 16 floats, which are float32 or bfloat16 in memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t kMaxDim = 256;       // largest size of a head
constexpr int64_t kSerialWork = 8192;  // elements below which forking the team costs more than it saves

struct bfloat16 {
  uint16_t bits;
};

inline Floats load(const float* p) {
  Floats x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline Floats load(const bfloat16* p) { return as_floats(load_halves(p) << 16); }

inline FloatPart load_part(const float* p) {
  FloatPart x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline FloatPart load_part(const bfloat16* p) { return (FloatPart)(load_half_part(p) << 16); }

inline void store_part(float* p, FloatPart x) { std::memcpy(p, &x, sizeof x); }

inline float to_float(float x) { return x; }

inline float to_float(bfloat16 x) {
  const uint32_t w = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &w, sizeof f);
  return f;
}

template <typename T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

// Rounds to nearest, ties to even; NaN stays NaN.
template <>
inline bfloat16 from_float<bfloat16>(float x) {
  uint32_t w;
  std::memcpy(&w, &x, sizeof w);
  if (x != x) return {0x7fc0};
  return {static_cast<uint16_t>((w + 0x7fff + ((w >> 16) & 1)) >> 16)};
}

inline void store(float* p, const Floats& x) { std::memcpy(p, &x, sizeof x); }

// Rounds to nearest, ties to even; NaN stays NaN.
inline void store(bfloat16* p, const Floats& x) {
  Words w, nan;
  std::memcpy(&w, &x, sizeof w);
  const Words rounded = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
  const Ints mask = x != x;
  std::memcpy(&nan, &mask, sizeof nan);
  store_halves(p, (nan & 0x7fc0u) | (~nan & rounded));
}

// Returns the sum of the lanes: halves, quarters and so on are added until one is left.
inline float sum(const Floats& x) {
  typedef float Four __attribute__((vector_size(16)));
  Four four;
#ifdef __AVX__
  typedef float Eight __attribute__((vector_size(32)));
  Eight halves[2];
  std::memcpy(halves, &x, sizeof x);
  const Eight eight = halves[0] + halves[1];
  Four quarters[2];
  std::memcpy(quarters, &eight, sizeof eight);
  four = quarters[0] + quarters[1];
#else
  four = (x.parts[0] + x.parts[2]) + (x.parts[1] + x.parts[3]);
#endif
  typedef int Index __attribute__((vector_size(16)));
  four += __builtin_shuffle(four, Index{2, 3, 0, 1});
  four += __builtin_shuffle(four, Index{1, 0, 3, 2});
  return four[0];
}

// Returns the largest of the lanes.
inline float largest_of(const Floats& x) {
  alignas(64) float lanes[kLanes];
  store(lanes, x);
  return *std::max_element(lanes, lanes + kLanes);
}

// Returns e^x to float32 rounding, as 2^n times a polynomial in the remainder (Cephes' coefficients). NaN stays NaN,
// −inf gives 0.
inline Floats exponential(const Floats& x) {
  const Floats clamped = select(x < splat(-87.3f), splat(-87.3f), select(x > splat(88.0f), splat(88.0f), x));
  const Floats shifted = clamped * 1.44269504f + select(clamped < splat(0.0f), splat(-0.5f), splat(0.5f));
  const Ints n = to_ints(select(shifted != shifted, splat(0.0f), shifted));
  const Floats whole = to_floats(n);
  const Floats rest = (clamped - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats y = splat(1.9875691500e-4f);
  y = y * rest + 1.3981999507e-3f;
  y = y * rest + 8.3334519073e-3f;
  y = y * rest + 4.1665795894e-2f;
  y = y * rest + 1.6666665459e-1f;
  y = y * rest + 5.0000001201e-1f;
  y = y * rest * rest + rest + 1.0f;
  const Ints power = (n + 127) << 23;
  Floats scale;
  std::memcpy(&scale, &power, sizeof scale);
  return select(x < splat(-87.3f), splat(0.0f), y * scale);
}

}  // namespace
