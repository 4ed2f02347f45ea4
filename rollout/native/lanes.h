// Vectors of 16 floats in GCC/Clang extensions, so that one source serves every instruction set of -march=native.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kMaxDim = 256;       // largest size of a head
constexpr int64_t kSerialWork = 8192;  // elements below which forking the team costs more than it saves

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

struct bfloat16 {
  uint16_t bits;
};

inline Floats load(const float* p) {
  Floats x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline Floats load(const bfloat16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  const Words w = __builtin_convertvector(h, Words) << 16;
  Floats x;
  std::memcpy(&x, &w, sizeof x);
  return x;
}

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

inline void store(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }

// Rounds to nearest, ties to even; NaN stays NaN.
inline void store(bfloat16* p, Floats x) {
  Words w;
  std::memcpy(&w, &x, sizeof w);
  const Words rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
  const Ints nan = x != x;
  Words mask;
  std::memcpy(&mask, &nan, sizeof mask);
  const Halves h = __builtin_convertvector((mask & 0x7fc0) | (~mask & rounded), Halves);
  std::memcpy(p, &h, sizeof h);
}

inline Floats splat(float x) { return Floats{} + x; }

inline Floats select(Ints mask, Floats yes, Floats no) { return mask ? yes : no; }

inline float sum(Floats x) {
  typedef float Eight __attribute__((vector_size(32)));
  typedef float Four __attribute__((vector_size(16)));
  Eight halves[2];
  std::memcpy(halves, &x, sizeof x);
  const Eight eight = halves[0] + halves[1];
  Four quarters[2];
  std::memcpy(quarters, &eight, sizeof eight);
  Four four = quarters[0] + quarters[1];
  typedef int Index __attribute__((vector_size(16)));
  four += __builtin_shuffle(four, Index{2, 3, 0, 1});
  four += __builtin_shuffle(four, Index{1, 0, 3, 2});
  return four[0];
}

// Returns the largest of the lanes.
inline float largest_of(Floats x) {
  alignas(64) float lanes[kLanes];
  store(lanes, x);
  return *std::max_element(lanes, lanes + kLanes);
}

// Returns e^x to float32 rounding, as 2^n times a polynomial in the remainder (Cephes' coefficients). NaN stays NaN,
// −inf gives 0.
inline Floats exponential(Floats x) {
  const Floats clamped = select(x < splat(-87.3f), splat(-87.3f), select(x > splat(88.0f), splat(88.0f), x));
  const Floats shifted = clamped * 1.44269504f + select(clamped < splat(0.0f), splat(-0.5f), splat(0.5f));
  const Ints n = __builtin_convertvector(select(shifted != shifted, splat(0.0f), shifted), Ints);
  const Floats whole = __builtin_convertvector(n, Floats);
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
