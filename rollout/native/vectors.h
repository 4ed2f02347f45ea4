// Vectors of 16 lanes in GCC's extensions: one register with AVX-512, several narrower ones without.
//
// A compiler keeps a vector that is wider than its registers in memory, and loads and stores it in every operation.
// Without AVX-512 a vector is therefore a struct of vectors that do fit. Arrays of such structs stay in memory all the
// same: the sums of a product are arrays of `FloatPart`, a vector of one register.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __clang__
#error the kernels need GCC, because clang would start OpenMP threads of its own beside those of torch: install g++
#endif

namespace {

constexpr int64_t kLanes = 16;
#if defined(__AVX512F__)
constexpr int kRegister = 64;  // bytes
#elif defined(__AVX__)
constexpr int kRegister = 32;
#else
constexpr int kRegister = 16;
#endif
constexpr int kParts = 64 / kRegister, kPartLanes = kLanes / kParts;
constexpr bool kWide = kParts == 1;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;  // vector registers that the instruction set names
#else
constexpr int kRegisters = 16;
#endif

typedef float FloatPart __attribute__((vector_size(kRegister)));
typedef uint32_t WordPart __attribute__((vector_size(kRegister)));

// Returns 16-bit numbers, as many as fit into a register as words.
inline WordPart load_half_part(const void* p) {
  uint16_t __attribute__((vector_size(kRegister / 2))) halves;
  std::memcpy(&halves, p, sizeof halves);
  return __builtin_convertvector(halves, WordPart);
}

#ifdef __AVX512F__

typedef FloatPart Floats;
typedef WordPart Words;
typedef int32_t Ints __attribute__((vector_size(64)));

inline Floats joined(const FloatPart* parts) { return *parts; }

inline Ints to_ints(Floats x) { return __builtin_convertvector(x, Ints); }
inline Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }
inline Floats select(Ints mask, Floats yes, Floats no) { return mask ? yes : no; }

inline Words load_halves(const void* p) { return load_half_part(p); }

inline void store_halves(void* p, Words x) {
  typedef uint16_t Halves __attribute__((vector_size(32)));
  const Halves halves = __builtin_convertvector(x, Halves);
  std::memcpy(p, &halves, sizeof halves);
}

inline void store_bytes(int8_t* p, Ints x) {
  typedef int8_t Bytes __attribute__((vector_size(16)));
  const Bytes bytes = __builtin_convertvector(x, Bytes);
  std::memcpy(p, &bytes, sizeof bytes);
}

#else

template <typename T>
struct Lanes {
  typedef T Part __attribute__((vector_size(kRegister)));
  Part parts[kParts];

  T operator[](int64_t lane) const { return parts[lane / kPartLanes][lane % kPartLanes]; }

  // Returns the vector whose parts `part` returns for each index.
  template <typename MakePart>
  static Lanes each(MakePart part) {
    Lanes x;
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) x.parts[i] = part(i);
    return x;
  }

#define PACELINE_OPERATOR(OP)                                                                                                      \
  friend Lanes operator OP(const Lanes& a, const Lanes& b) {                                                                       \
    return each([&](int i) { return a.parts[i] OP b.parts[i]; });                                                                  \
  }                                                                                                                                \
  friend Lanes operator OP(const Lanes& a, T b) {                                                                                  \
    return each([&](int i) { return a.parts[i] OP b; });                                                                           \
  }                                                                                                                                \
  friend Lanes operator OP(T a, const Lanes& b) {                                                                                  \
    return each([&](int i) { return a OP b.parts[i]; });                                                                           \
  }                                                                                                                                \
  Lanes& operator OP##=(const Lanes& b) { return *this = *this OP b; }
  PACELINE_OPERATOR(+)
  PACELINE_OPERATOR(-)
  PACELINE_OPERATOR(*)
  PACELINE_OPERATOR(/)
  PACELINE_OPERATOR(&)
  PACELINE_OPERATOR(|)
#undef PACELINE_OPERATOR

  friend Lanes operator-(const Lanes& a) {
    return each([&](int i) { return -a.parts[i]; });
  }
  friend Lanes operator~(const Lanes& a) {
    return each([&](int i) { return ~a.parts[i]; });
  }
  friend Lanes operator<<(const Lanes& a, int bits) {
    return each([&](int i) { return a.parts[i] << bits; });
  }
  friend Lanes operator>>(const Lanes& a, int bits) {
    return each([&](int i) { return a.parts[i] >> bits; });
  }

#define PACELINE_COMPARISON(OP)                                                                                                    \
  friend Lanes<int32_t> operator OP(const Lanes& a, const Lanes& b) {                                                              \
    return Lanes<int32_t>::each([&](int i) { return a.parts[i] OP b.parts[i]; });                                                  \
  }
  PACELINE_COMPARISON(<)
  PACELINE_COMPARISON(>)
  PACELINE_COMPARISON(!=)
#undef PACELINE_COMPARISON
};

typedef Lanes<float> Floats;
typedef Lanes<uint32_t> Words;
typedef Lanes<int32_t> Ints;

inline Floats joined(const FloatPart* parts) {
  return Floats::each([&](int i) { return parts[i]; });
}

inline Ints to_ints(const Floats& x) {
  return Ints::each([&](int i) { return __builtin_convertvector(x.parts[i], Ints::Part); });
}

inline Floats to_floats(const Ints& x) {
  return Floats::each([&](int i) { return __builtin_convertvector(x.parts[i], Floats::Part); });
}

inline Floats select(const Ints& mask, const Floats& yes, const Floats& no) {
  return Floats::each([&](int i) { return mask.parts[i] ? yes.parts[i] : no.parts[i]; });
}

inline Words load_halves(const void* p) {
  return Words::each([&](int i) { return load_half_part(static_cast<const uint16_t*>(p) + i * kPartLanes); });
}

inline void store_halves(void* p, const Words& x) {
  typedef uint16_t Halves __attribute__((vector_size(kRegister / 2)));
  for (int i = 0; i < kParts; ++i) {
    const Halves halves = __builtin_convertvector(x.parts[i], Halves);
    std::memcpy(static_cast<char*>(p) + i * sizeof halves, &halves, sizeof halves);
  }
}

inline void store_bytes(int8_t* p, const Ints& x) {
  for (int64_t lane = 0; lane < kLanes; ++lane) p[lane] = static_cast<int8_t>(x[lane]);
}

#endif

inline Floats splat(float x) { return Floats{} + x; }

// Returns the numbers whose bits the words are.
inline Floats as_floats(const Words& bits) {
  Floats x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace
