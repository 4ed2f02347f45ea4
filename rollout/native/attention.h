// Attention over slots, where each token attends to the keys it sees: on vector units here, on matrix units in tiles.h.
#pragma once

#include <omp.h>

#include "layout.h"
#include "tiles.h"

namespace {

constexpr int64_t kAhead = 12;  // prefetch distance in keys

// Prefetches the value of key j, which is read soon after it, and a later key. The hardware prefetcher does not go as far
// across pages.
template <typename T>
void prefetch_lines(const T* keys, const T* values, int64_t j, int64_t dim) {
  const char* ahead = reinterpret_cast<const char*>(keys + (j + kAhead) * dim);
  const char* value = reinterpret_cast<const char*>(values + j * dim);
  for (size_t line = 0; line < dim * sizeof(T); line += 64) {
    __builtin_prefetch(ahead + line, 0, 3);
    __builtin_prefetch(value + line, 0, 2);
  }
}

#ifdef __AVX512F__

// Returns the sums of 16 vectors, in order. Folding two vectors into one at a time takes a third of the work of 16
// separate sums.
inline Floats sum_each(const Floats* v) {
  Floats eight[8], four[4], two[2];
  for (int i = 0; i < 8; ++i)
    eight[i] = __builtin_shuffle(v[i], v[i + 8], Ints{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}) +
               __builtin_shuffle(v[i], v[i + 8], Ints{8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31});
  for (int i = 0; i < 4; ++i)
    four[i] = __builtin_shuffle(eight[i], eight[i + 4], Ints{0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27}) +
              __builtin_shuffle(eight[i], eight[i + 4], Ints{4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31});
  for (int i = 0; i < 2; ++i)
    two[i] = __builtin_shuffle(four[i], four[i + 2], Ints{0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29}) +
             __builtin_shuffle(four[i], four[i + 2], Ints{2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31});
  return __builtin_shuffle(two[0], two[1], Ints{0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30}) +
         __builtin_shuffle(two[0], two[1], Ints{1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31});
}

// Computes the scores of kRows query rows against `count` keys, as many keys at a time as fill a vector of scores. Each
// key is read once.
template <typename T, int kVectors, int kRows>
void score_rows(const float* query, const T* keys, const T* values, int64_t count, float* scores) {
  constexpr int64_t dim = kVectors * kLanes;
  constexpr int kKeys = kLanes / kRows;
  Floats rows[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int i = 0; i < kVectors; ++i) rows[r][i] = load(query + r * dim + i * kLanes);
  const auto products = [&](int64_t j, Floats* out, int stride) {
    prefetch_lines(keys, values, j, dim);
    for (int r = 0; r < kRows; ++r) out[r * stride] = Floats{};
    for (int i = 0; i < kVectors; ++i) {
      const Floats key = load(keys + j * dim + i * kLanes);
      for (int r = 0; r < kRows; ++r) out[r * stride] += key * rows[r][i];
    }
  };
  int64_t j = 0;
  for (; j + kKeys <= count; j += kKeys) {
    Floats sums[kLanes] = {};
#pragma GCC unroll 16
    for (int k = 0; k < kKeys; ++k) products(j + k, sums + k, kKeys);
    alignas(64) float lanes[kLanes];
    store(lanes, sum_each(sums));
    for (int r = 0; r < kRows; ++r) std::memcpy(scores + r * kChunk + j, lanes + r * kKeys, kKeys * sizeof(float));
  }
  for (; j < count; ++j) {
    Floats sums[kRows];
    products(j, sums, 1);
    for (int r = 0; r < kRows; ++r) scores[r * kChunk + j] = sum(sums[r]);
  }
}

// Computes the sums of `count` values weighted by kRows rows of weights.
template <typename T, int kVectors, int kRows>
void weigh_rows(const float* weights, const T* values, int64_t count, float* out) {
  constexpr int64_t dim = kVectors * kLanes;
  Floats sums[kRows][kVectors] = {};
  for (int64_t j = 0; j < count; ++j) {
    Floats value[kVectors];
    for (int i = 0; i < kVectors; ++i) value[i] = load(values + j * dim + i * kLanes);
    for (int r = 0; r < kRows; ++r)
      for (int i = 0; i < kVectors; ++i) sums[r][i] += weights[r * kChunk + j] * value[i];
  }
  for (int r = 0; r < kRows; ++r)
    for (int i = 0; i < kVectors; ++i) store(out + r * dim + i * kLanes, sums[r][i]);
}

#else

// Computes the scores of kRows query rows against `count` keys. Sums of one key are all that few registers hold.
template <typename T, int kVectors, int kRows>
void score_rows(const float* query, const T* keys, const T* values, int64_t count, float* scores) {
  constexpr int64_t dim = kVectors * kLanes;
  for (int64_t j = 0; j < count; ++j) {
    prefetch_lines(keys, values, j, dim);
    FloatPart sums[kRows][kParts] = {};
    for (int64_t d = 0; d < dim; d += kLanes)
      for (int p = 0; p < kParts; ++p) {
        const FloatPart key = load_part(keys + j * dim + d + p * kPartLanes);
        for (int r = 0; r < kRows; ++r) sums[r][p] += key * load_part(query + r * dim + d + p * kPartLanes);
      }
    for (int r = 0; r < kRows; ++r) scores[r * kChunk + j] = sum(joined(sums[r]));
  }
}

// Computes the sums of `count` values weighted by kRows rows of weights, 16 dimensions at a time.
template <typename T, int kVectors, int kRows>
void weigh_rows(const float* weights, const T* values, int64_t count, float* out) {
  constexpr int64_t dim = kVectors * kLanes;
  for (int64_t d = 0; d < dim; d += kLanes) {
    FloatPart sums[kRows][kParts] = {};
    for (int64_t j = 0; j < count; ++j)
      for (int p = 0; p < kParts; ++p) {
        const FloatPart value = load_part(values + j * dim + d + p * kPartLanes);
        for (int r = 0; r < kRows; ++r) sums[r][p] += weights[r * kChunk + j] * value;
      }
    for (int r = 0; r < kRows; ++r) store(out + r * dim + d, joined(sums[r]));
  }
}

#endif

// Rows of a head of kVectors vectors whose sums fit into the registers.
template <int kVectors>
constexpr int rows_together() {
  if (kWide) return kVectors <= 4 ? 4 : kVectors <= 8 ? 2 : 1;
  return kRegisters / kParts >= 8 ? 4 : 2;
}

// Calls `block` for `rows` rows, in blocks of at most kMost, which is 4, 2 or 1.
template <int kMost, typename Block>
void for_row_blocks(int64_t rows, Block block) {
  int64_t r = 0;
  if constexpr (kMost == 4)
    for (; r + 4 <= rows; r += 4) block(r, std::integral_constant<int, 4>{});
  if constexpr (kMost == 4)
    for (; r + 3 <= rows; r += 3) block(r, std::integral_constant<int, 3>{});
  if constexpr (kMost >= 2)
    for (; r + 2 <= rows; r += 2) block(r, std::integral_constant<int, 2>{});
  for (; r < rows; ++r) block(r, std::integral_constant<int, 1>{});
}

// Turns one row of scores, of the keys that token n sees from the start-th on, into weights e^(score − largest). Weights
// are zero for keys that the rule hides and past those that it sees.
inline void weigh_scores(float* row, const Layout& s, int64_t n, int64_t start, const AttentionRule& rule, int64_t count,
                         float* largest, float* total) {
  const float none = -std::numeric_limits<float>::infinity();
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes, end = std::clamp<int64_t>(s.seen(n) - start, 0, count);
  const int64_t trunk = std::clamp<int64_t>(s.trunks[n] - start, 0, count);
  const int64_t begin = rule.window > 0 ? std::clamp<int64_t>(s.seats[n] - rule.window + 1 - start, 0, trunk) : 0;
  if (rule.softcap > 0)
    for (int64_t j = begin; j < end; ++j) row[j] = rule.softcap * std::tanh(row[j] / rule.softcap);
  std::fill(row, row + begin, none);
  std::fill(row + end, row + padded, none);
  Floats most = splat(none);
  for (int64_t j = 0; j < padded; j += kLanes) {
    const Floats x = load(row + j);
    most = select(x > most, x, most);
  }
  *largest = largest_of(most);
  const float shift = std::isinf(*largest) ? 0.0f : *largest;
  Floats sums = {};
  for (int64_t j = 0; j < padded; j += kLanes) {
    const Floats weight = exponential(load(row + j) - shift);
    sums += weight;
    store(row + j, weight);
  }
  *total = sum(sums);
}

// Computes the attention of an item's rows (heads of one group × its tokens) in float32.
//
// A draft node's ancestors lie apart in the cache, but take part in the order of the text, as they will once they are
// committed. What a node computes is therefore, bit for bit, what plain decoding computes at its position.
template <typename T, int kVectors>
class VectorUnits {
 public:
  static constexpr int64_t kTokens = 8;
  static constexpr bool kByPosition = true;

  explicit VectorUnits(int64_t group) {
    static thread_local std::vector<float> memory;
    memory.resize(group * kTokens * (kDim + kChunk));
    scaled_ = memory.data(), scores_ = scaled_ + group * kTokens * kDim;
  }

  void attend(const T* query, const T* keys, const T* values, const Layout& s, const Item& item, const AttentionRule& rule,
              const Partial& out) {
    const int64_t group = s.heads / s.kv_heads, rows = group * item.queries;
    for (int64_t r = 0; r < rows; ++r) {
      const T* source = query + s.head_of(item, r) * kDim;
      for (int64_t i = 0; i < kDim; i += kLanes) store(scaled_ + r * kDim + i, load(source + i) * rule.scale);
    }
    for_row_blocks<rows_together<kVectors>()>(rows, [&](int64_t r, auto block) {
      score_rows<T, kVectors, block.value>(scaled_ + r * kDim, keys, values, item.count, scores_ + r * kChunk);
    });
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t n = item.first + r % item.queries;
      float* row = scores_ + r * kChunk;
      for_ancestors(s, n, item, [&](int64_t place, int64_t at, int64_t) { row[at] = score_of(r, keys + place * kDim); });
      weigh_scores(row, s, n, item.start, rule, item.count, out.largest + r, out.total + r);
    }
    if (!any_ancestors(s, item)) return weigh(values, rows, item.count, out);
    // the trunk's values first, then each row's ancestors: the order of the text
    std::vector<float>& kept = weights_of_ancestors();
    kept.assign(rows * kAncestors, 0.0f);
    for (int64_t r = 0; r < rows; ++r)
      for_ancestors(s, item.first + r % item.queries, item, [&](int64_t, int64_t at, int64_t i) {
        std::swap(kept[r * kAncestors + i], scores_[r * kChunk + at]);
      });
    weigh(values, rows, item.count, out);
    for (int64_t r = 0; r < rows; ++r)
      for_ancestors(s, item.first + r % item.queries, item, [&](int64_t place, int64_t, int64_t i) {
        float* sums = out.weighted + r * kDim;
        for (int64_t d = 0; d < kDim; d += kLanes) {
          Floats sum = load(sums + d);
          sum += kept[r * kAncestors + i] * load(values + place * kDim + d);
          store(sums + d, sum);
        }
      });
  }

 private:
  static constexpr int64_t kDim = kVectors * kLanes;
  static constexpr int64_t kAncestors = 64;
  float *scaled_, *scores_;

  static std::vector<float>& weights_of_ancestors() {
    static thread_local std::vector<float> memory;
    return memory;
  }

  static bool any_ancestors(const Layout& s, const Item& item) {
    return std::any_of(s.ancestors + item.first, s.ancestors + item.first + item.queries, [](uint64_t bits) { return bits != 0; });
  }

  // Calls `visit` for each ancestor of token n that belongs to the item, with its place and its place in the order of the
  // text, both counted from the item's start, and its number.
  template <typename Visit>
  static void for_ancestors(const Layout& s, int64_t n, const Item& item, Visit visit) {
    const int64_t trunk = s.trunks[n] - item.start;
    int64_t i = 0;
    for (uint64_t bits = s.ancestors[n]; bits != 0; bits &= bits - 1, ++i)
      if (trunk + i >= 0 && trunk + i < item.count) visit(trunk + __builtin_ctzll(bits), trunk + i, i);
  }

  float score_of(int64_t r, const T* key) const {
    Floats product = {};
    for (int64_t d = 0; d < kDim; d += kLanes) product += load(key + d) * load(scaled_ + r * kDim + d);
    return sum(product);
  }

  void weigh(const T* values, int64_t rows, int64_t count, const Partial& out) {
    for_row_blocks<rows_together<kVectors>()>(rows, [&](int64_t r, auto block) {
      weigh_rows<T, kVectors, block.value>(scores_ + r * kChunk, values, count, out.weighted + r * kDim);
    });
  }
};

// Keys are split into chunks so that one long sequence occupies every core, and the partial results are joined
// afterwards (Dao et al., "Flash-Decoding for long-context inference", 2023). A sequence's cost depends on its own
// length, not on the longest.
template <typename Units, typename T, int kVectors>
void attend_by(const T* query, const T* cache, T* out, const Layout& s, const AttentionRule& rule) {
  constexpr int64_t dim = kVectors * kLanes;
  const int64_t group = s.heads / s.kv_heads, most_rows = group * Units::kTokens, per_item = most_rows * (dim + 2);
  static thread_local std::vector<Item> items_of_thread;
  static thread_local std::vector<int64_t> groups_of_thread;
  static thread_local std::vector<float> partials;
  const int64_t work = list_items(s, Units::kTokens, Units::kByPosition, &items_of_thread, &groups_of_thread);
  const std::vector<Item>& items = items_of_thread;
  const std::vector<int64_t>& groups = groups_of_thread;
  if (static_cast<int64_t>(partials.size()) < static_cast<int64_t>(items.size()) * per_item) partials.resize(items.size() * per_item);
  float* base = partials.data();
  const auto partial = [base, per_item, most_rows](int64_t item) {
    float* p = base + item * per_item;
    return Partial{p, p + most_rows, p + 2 * most_rows};
  };
#pragma omp parallel if (work * dim > kSerialWork)
  {
    Units units(group);
    const auto keys_of = [&](const Item& item) {
      return cache + ((s.token_slots[item.first] * s.kv_heads + item.kv) * s.span + item.start) * dim;
    };
    // each thread takes a contiguous run of items with about equal work, so that it reads the cache in order
    const auto begin_of = [&](int64_t thread) {
      const int64_t target = work * thread / omp_get_num_threads();
      return std::partition_point(items.begin(), items.end(), [target](const Item& item) { return item.before < target; });
    };
    const auto end = begin_of(omp_get_thread_num() + 1);
    for (auto item = begin_of(omp_get_thread_num()); item != end; ++item) {
      const T* keys = keys_of(*item);
      const T* values = keys + s.slots * s.kv_heads * s.span * dim;
      units.attend(query, keys, values, s, *item, rule, partial(item - items.begin()));
    }
#pragma omp barrier
#pragma omp for
    for (int64_t g = 0; g < static_cast<int64_t>(groups.size()) - 1; ++g) {
      const Item& item = items[groups[g]];
      for (int64_t r = 0; r < group * item.queries; ++r) {
        float largest = -std::numeric_limits<float>::infinity(), total = 0;
        for (int64_t n = groups[g]; n < groups[g + 1]; ++n) largest = std::max(largest, partial(n).largest[r]);
        Floats sums[kVectors] = {};
        for (int64_t n = groups[g]; n < groups[g + 1]; ++n) {
          const Partial p = partial(n);
          // a chunk completely outside the window has a total of 0; NaN must stay NaN
          const float weight = p.total[r] == 0 ? 0 : std::exp(std::isinf(p.largest[r]) ? 0 : p.largest[r] - largest);
          total += weight * p.total[r];
          for (int i = 0; i < kVectors; ++i) sums[i] += weight * load(p.weighted + r * dim + i * kLanes);
        }
        T* target = out + s.head_of(item, r) * dim;
        for (int i = 0; i < kVectors; ++i) store(target + i * kLanes, sums[i] / total);
      }
    }
  }
}

template <typename T, int kVectors>
void attend(const T* query, const T* cache, T* out, const Layout& s, const AttentionRule& rule) {
#ifdef PACELINE_TILES
  if constexpr (std::is_same_v<T, bfloat16> && kVectors % 2 == 0) {
    if (rule.softcap == 0 && tiles_granted()) return attend_by<MatrixUnits<kVectors>, T, kVectors>(query, cache, out, s, rule);
  }
#endif
  attend_by<VectorUnits<T, kVectors>, T, kVectors>(query, cache, out, s, rule);
}

// Calls `run` with the number of vectors of a head of `dim` numbers, as a constant.
template <typename Run>
void with_vectors(int64_t dim, Run run) {
  switch (dim / kLanes) {
    case 1: return run(std::integral_constant<int, 1>{});
    case 2: return run(std::integral_constant<int, 2>{});
    case 4: return run(std::integral_constant<int, 4>{});
    case 5: return run(std::integral_constant<int, 5>{});
    case 6: return run(std::integral_constant<int, 6>{});
    case 8: return run(std::integral_constant<int, 8>{});
    case 16: return run(std::integral_constant<int, 16>{});
  }
}

template <typename T>
void attend_any(const T* query, const T* cache, T* out, const Layout& s, const AttentionRule& rule) {
  with_vectors(s.dim, [&](auto vectors) { attend<T, vectors.value>(query, cache, out, s, rule); });
}

}  // namespace
