// Attention of one work item on the processor's matrix units (AMX), where available: bfloat16 products, float32 sums.
//
// Verifying draft tokens multiplies the arithmetic of attention by their number but reads the same keys and values. On
// vector units this arithmetic dominates a step already at a few sequences of a thousand tokens; here up to 16 rows
// (heads of one group × tokens) cost little more than one. Keys are read as they lie in the cache, so the scores come
// out as [keys, rows]. This also makes the softmax's maximum and total plain vector operations, without a sum across
// lanes.
#pragma once

#include "layout.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define PACELINE_TILES

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int64_t kTileRows = 16;    // query rows in a tile, and keys in a tile
constexpr int64_t kBlocksAhead = 1;  // prefetch distance in key blocks
constexpr int64_t kKeyBlock = 32;    // keys in one product of weights and values
constexpr float kHidden = -1e30f;    // score of a hidden key; finite, so that its exponential is 0, not NaN

// Returns whether this process may use tile registers; Linux requires each process to request them once.
inline bool tiles_granted() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

// Configures all eight tiles as 16 rows of 64 bytes for its lifetime, and then restores the previous configuration,
// because another library may rely on the one it has set.
class TileShapes {
 public:
  TileShapes() {
    _tile_storeconfig(before_);
    alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < 8; ++tile) config[16 + 2 * tile] = 64, config[48 + tile] = kTileRows;
    _tile_loadconfig(config);
  }
  ~TileShapes() { _tile_loadconfig(before_); }
  TileShapes(const TileShapes&) = delete;
  TileShapes& operator=(const TileShapes&) = delete;

 private:
  alignas(64) uint8_t before_[64];
};

// Transposes 16 vectors of 16 32-bit words.
inline void transpose(__m512i* v) {
  __m512i t[16], u[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    u[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    u[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int c = 0; c < 4; ++c) {
    const __m512i even = _mm512_shuffle_i32x4(u[c], u[4 + c], 0x88), odd = _mm512_shuffle_i32x4(u[c], u[4 + c], 0xdd);
    const __m512i even_after = _mm512_shuffle_i32x4(u[8 + c], u[12 + c], 0x88);
    const __m512i odd_after = _mm512_shuffle_i32x4(u[8 + c], u[12 + c], 0xdd);
    v[c] = _mm512_shuffle_i32x4(even, even_after, 0x88);
    v[4 + c] = _mm512_shuffle_i32x4(odd, odd_after, 0x88);
    v[8 + c] = _mm512_shuffle_i32x4(even, even_after, 0xdd);
    v[12 + c] = _mm512_shuffle_i32x4(odd, odd_after, 0xdd);
  }
}

// Returns 2^x for x ≤ 0: a polynomial for 2^f with |f| ≤ ½ (Chebyshev nodes, relative error below 2e-7), scaled by the
// integer part. NaN stays NaN.
inline __m512 power_of_two(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);
  __m512 y = _mm512_set1_ps(1.339086336e-03f);
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.676031918e-03f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.550357114e-02f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.402210749e-01f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.931471880e-01f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.000000075e+00f));
  return _mm512_scalef_ps(y, whole);
}

// The working memory of a thread.
template <int64_t kDim>
struct TileScratch {
  alignas(64) bfloat16 queries[kDim / 32][kTileRows][32];  // pairs of dimensions × rows
  alignas(64) float scores[kChunk][kTileRows];
  alignas(64) bfloat16 weights[kChunk / kKeyBlock][kTileRows][kKeyBlock];
  alignas(64) bfloat16 values[kChunk / kKeyBlock][kDim / 16][kTileRows][32];  // pairs of keys × 16 dimensions
  alignas(64) bfloat16 last_keys[kKeyBlock][kDim], last_values[kKeyBlock][kDim];
  alignas(64) float sums[kDim / 16][kTileRows][16];
};

// The keys that a row block sees: those from `begin` to `trunk`, and from there on those whose bit is set.
struct Sight {
  int64_t rows, begin[kTileRows], trunk[kTileRows];
  uint64_t ancestors[kTileRows];

  __mmask16 of(int64_t key) const {
    __mmask16 seen = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t past = key - trunk[r];
      if (key >= begin[r] && (past < 0 || (past < 64 && (ancestors[r] >> past & 1)))) seen |= 1 << r;
    }
    return seen;
  }
};

// The keys and values of one item; the last block is padded with zeros, so that nothing past the text is read.
template <int64_t kDim>
struct TileKeys {
  const bfloat16 *keys, *values;
  int64_t count;
  TileScratch<kDim>& scratch;

  int64_t blocks() const { return (count + kKeyBlock - 1) / kKeyBlock; }
  const bfloat16* block_of_keys(int64_t b) const { return (b + 1) * kKeyBlock <= count ? keys + b * kKeyBlock * kDim : scratch.last_keys[0]; }
  const bfloat16* block_of_values(int64_t b) const { return (b + 1) * kKeyBlock <= count ? values + b * kKeyBlock * kDim : scratch.last_values[0]; }

  void pad_last() {
    const int64_t whole = count / kKeyBlock * kKeyBlock, bytes = (count - whole) * kDim * sizeof(bfloat16);
    std::memcpy(scratch.last_keys, keys + whole * kDim, bytes);
    std::memcpy(scratch.last_values, values + whole * kDim, bytes);
    std::memset(scratch.last_keys[count - whole], 0, sizeof scratch.last_keys - bytes);
    std::memset(scratch.last_values[count - whole], 0, sizeof scratch.last_values - bytes);
  }

  // Places pairs of keys side by side. The unpack instruction works within 128 bits, so a tile's 16 columns are the
  // dimensions 8i + (0…3), or those + 4.
  void pair_values(int64_t b) {
    const bfloat16* block = block_of_values(b);
    for (int64_t pair = 0; pair < kKeyBlock / 2; ++pair)
      for (int64_t d = 0; d < kDim; d += 32) {
        const __m512i even = _mm512_loadu_si512(block + 2 * pair * kDim + d), odd = _mm512_loadu_si512(block + (2 * pair + 1) * kDim + d);
        _mm512_store_si512(scratch.values[b][d / 16][pair], _mm512_unpacklo_epi16(even, odd));
        _mm512_store_si512(scratch.values[b][d / 16 + 1][pair], _mm512_unpackhi_epi16(even, odd));
      }
  }

  // Computes scores[key, row] of the queries in the scratch. The first call also pairs the values; keys and values are
  // prefetched, further ahead than the hardware prefetcher goes across pages.
  void score(bool first) {
    for (int64_t b = 0; b < blocks(); ++b) {
      const bfloat16* block = block_of_keys(b);
      if (first && block != scratch.last_keys[0])
        for (int64_t line = 0; line < kKeyBlock * kDim; line += 32) {
          __builtin_prefetch(block + kBlocksAhead * kKeyBlock * kDim + line, 0, 3);
          __builtin_prefetch(values + (b + kBlocksAhead) * kKeyBlock * kDim + line, 0, 3);
        }
      _tile_zero(0);
      _tile_zero(1);
      for (int64_t d = 0; d < kDim / 32; ++d) {
        _tile_loadd(2, scratch.queries[d], 64);
        _tile_loadd(3, block + 32 * d, kDim * sizeof(bfloat16));
        _tile_loadd(4, block + kTileRows * kDim + 32 * d, kDim * sizeof(bfloat16));
        _tile_dpbf16ps(0, 3, 2);
        _tile_dpbf16ps(1, 4, 2);
      }
      if (first) pair_values(b);
      _tile_stored(0, scratch.scores[b * kKeyBlock], 64);
      _tile_stored(1, scratch.scores[b * kKeyBlock + kTileRows], 64);
    }
  }

  // Computes sums[row, dimension] of the values, weighted by the weights in the scratch.
  void weigh() {
    for (int64_t d = 0; d < kDim / 16; d += 2) {
      _tile_zero(0);
      _tile_zero(1);
      for (int64_t b = 0; b < blocks(); ++b) {
        _tile_loadd(2, scratch.weights[b], 64);
        _tile_loadd(3, scratch.values[b][d], 64);
        _tile_loadd(4, scratch.values[b][d + 1], 64);
        _tile_dpbf16ps(0, 2, 3);
        _tile_dpbf16ps(1, 2, 4);
      }
      _tile_stored(0, scratch.sums[d], 64);
      _tile_stored(1, scratch.sums[d + 1], 64);
    }
  }
};

// Turns scores into weights 2^(score − largest) and stores them as bfloat16 tiles [rows, keys]. Returns each row's
// largest score and total weight.
template <int64_t kDim>
void weights_of(TileScratch<kDim>& scratch, const Sight& sight, int64_t count, float scale, float* largest, float* total) {
  const int64_t padded = (count + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
  const int64_t from = *std::max_element(sight.begin, sight.begin + sight.rows);
  const int64_t until = std::min(count, *std::min_element(sight.trunk, sight.trunk + sight.rows));
  const __m512 hidden = _mm512_set1_ps(kHidden), factor = _mm512_set1_ps(scale * 1.44269504f);
  __m512 most = hidden;
  for (int64_t key = 0; key < padded; ++key) {
    __m512 x = _mm512_mul_ps(_mm512_load_ps(scratch.scores[key]), factor);
    if (key < from || key >= until) x = _mm512_mask_mov_ps(hidden, key < count ? sight.of(key) : 0, x);
    _mm512_store_ps(scratch.scores[key], x);
    most = _mm512_max_ps(most, x);
  }
  const __mmask16 none = _mm512_cmp_ps_mask(most, hidden, _CMP_EQ_OQ);
  const __m512 shift = _mm512_mask_mov_ps(most, none, _mm512_setzero_ps());
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
                                              19, 3, 18, 2, 17, 1, 16, 0);
  __m512 sums = _mm512_setzero_ps();
  for (int64_t b = 0; b < padded / kKeyBlock; ++b) {
    __m512i pairs[kTileRows];
    for (int64_t pair = 0; pair < kKeyBlock / 2; ++pair) {
      const int64_t key = b * kKeyBlock + 2 * pair;
      const __m512 even = power_of_two(_mm512_sub_ps(_mm512_load_ps(scratch.scores[key]), shift));
      const __m512 odd = power_of_two(_mm512_sub_ps(_mm512_load_ps(scratch.scores[key + 1]), shift));
      sums = _mm512_add_ps(sums, _mm512_add_ps(even, odd));
      pairs[pair] = _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
    }
    transpose(pairs);
    for (int64_t r = 0; r < kTileRows; ++r) _mm512_store_si512(scratch.weights[b][r], pairs[r]);
  }
  alignas(64) float largest_of[kTileRows], total_of[kTileRows];
  const __m512 natural = _mm512_mul_ps(most, _mm512_set1_ps(0.693147181f));
  _mm512_store_ps(largest_of, _mm512_mask_mov_ps(natural, none, _mm512_set1_ps(-std::numeric_limits<float>::infinity())));
  _mm512_store_ps(total_of, sums);
  std::copy(largest_of, largest_of + sight.rows, largest);
  std::copy(total_of, total_of + sight.rows, total);
}

// Computes the attention of an item's rows (heads of one group × its tokens), 16 at a time.
template <int kVectors>
class MatrixUnits {
 public:
  static constexpr int64_t kTokens = 16;
  static constexpr bool kByPosition = false;

  explicit MatrixUnits(int64_t) {}

  void attend(const bfloat16* query, const bfloat16* keys, const bfloat16* values, const Layout& s, const Item& item,
              const AttentionRule& rule, const Partial& out);

 private:
  static constexpr int64_t kDim = kVectors * kLanes;
  TileShapes shapes_;
};

template <int kVectors>
void MatrixUnits<kVectors>::attend(const bfloat16* query, const bfloat16* keys, const bfloat16* values, const Layout& s,
                                   const Item& item, const AttentionRule& rule, const Partial& out) {
  static thread_local TileScratch<kDim> scratch;
  const int64_t group = s.heads / s.kv_heads, rows = group * item.queries;
  TileKeys<kDim> seen{keys, values, item.count, scratch};
  if (item.count % kKeyBlock != 0) seen.pad_last();
  for (int64_t first = 0; first < rows; first += kTileRows) {
    Sight sight;
    sight.rows = std::min(kTileRows, rows - first);
    __m512i lines[kDim / 32][kTileRows] = {};
    for (int64_t r = 0; r < sight.rows; ++r) {
      const int64_t n = item.first + (first + r) % item.queries;
      sight.trunk[r] = s.trunks[n] - item.start;
      sight.begin[r] = rule.window > 0 ? s.seats[n] - rule.window + 1 - item.start : 0;
      sight.ancestors[r] = s.ancestors[n];
      const bfloat16* head = query + s.head_of(item, first + r) * kDim;
      for (int64_t d = 0; d < kDim / 32; ++d) lines[d][r] = _mm512_loadu_si512(head + 32 * d);
    }
    for (int64_t d = 0; d < kDim / 32; ++d) {
      transpose(lines[d]);
      for (int64_t pair = 0; pair < kTileRows; ++pair) _mm512_store_si512(scratch.queries[d][pair], lines[d][pair]);
    }
    seen.score(first == 0);
    weights_of(scratch, sight, item.count, rule.scale, out.largest + first, out.total + first);
    seen.weigh();
    for (int64_t r = 0; r < sight.rows; ++r)
      for (int64_t d = 0; d < kDim / 16; d += 2) {
        const Floats low = load(scratch.sums[d][r]), high = load(scratch.sums[d + 1][r]);
        float* target = out.weighted + (first + r) * kDim + 16 * d;
        store(target, __builtin_shuffle(low, high, Ints{0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23}));
        store(target + 16, __builtin_shuffle(low, high, Ints{8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31}));
      }
  }
}

}  // namespace

#endif
