// Decode kernels for the CPU: what is between two matrix products of a decoder layer, each in one pass.
//
// float32 or bfloat16 in memory, float32 in registers. GCC/Clang vector extensions, so that one source serves every instruction
// set that -march=native offers. Every function is called with the interpreter's lock released and forks the OpenMP team that torch uses.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kChunk = 256;        // keys that one work item attends to
constexpr int64_t kTile = 8;           // tokens of one sequence that it attends for
constexpr int64_t kAhead = 12;         // keys fetched before they are needed
constexpr int64_t kMaxDim = 256;       // of a head
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

inline void store(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }

// Rounds to nearest, ties to even; a NaN stays one.
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

// e^x to float32 rounding: 2^n times a polynomial in the rest (Cephes' coefficients). NaN stays NaN, −inf gives 0.
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

// One head: norm where there is a gain, then rotation of halves by the position's angle.
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

// One forward's tokens, sequence after sequence, and where they go: the cache is [2, slots, kv_heads, span, dim].
struct Layout {
  int64_t tokens, sequences, heads, kv_heads, dim, slots, span;
  const int64_t *token_slots, *positions, *offsets;  // offsets: [sequences + 1], of each sequence's first token
};

template <typename T>
void rotate_and_store(const T* joined, const T* cosines, const T* sines, const T* query_gain, const T* key_gain, float eps, T* query,
                      T* cache, const Layout& s) {
  const int64_t all = s.heads + 2 * s.kv_heads;
#pragma omp parallel for if (s.tokens * all * s.dim > kSerialWork)
  for (int64_t n = 0; n < s.tokens; ++n) {
    const T* row = joined + n * all * s.dim;
    const T *c = cosines + n * s.dim, *sn = sines + n * s.dim;
    for (int64_t h = 0; h < s.heads; ++h)
      rotate_head(row + h * s.dim, query_gain, eps, c, sn, query + (n * s.heads + h) * s.dim, s.dim);
    for (int64_t h = 0; h < s.kv_heads; ++h) {
      T* key = cache + ((s.token_slots[n] * s.kv_heads + h) * s.span + s.positions[n]) * s.dim;
      T* value = key + s.slots * s.kv_heads * s.span * s.dim;
      rotate_head(row + (s.heads + h) * s.dim, key_gain, eps, c, sn, key, s.dim);
      std::memcpy(value, row + (s.heads + s.kv_heads + h) * s.dim, s.dim * sizeof(T));
    }
  }
}

struct AttentionRule {
  float scale;
  float softcap;   // 0 for none
  int64_t window;  // 0 for none
};

// What one work item found: for every row the largest score, the sum of exponentials and the weighted sum of values.
struct Partial {
  float *largest, *total, *weighted;
};

// Scores of kRows query rows against `count` keys; the rows stay in registers while the keys pass.
//
// Each key is seen once and its value soon after: both are fetched ahead, further than the hardware looks across pages.
template <typename T, int kVectors, int kRows>
void score_rows(const float* query, const T* keys, const T* values, int64_t count, float* scores) {
  constexpr int64_t dim = kVectors * kLanes;
  Floats rows[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int i = 0; i < kVectors; ++i) rows[r][i] = load(query + r * dim + i * kLanes);
  for (int64_t j = 0; j < count; ++j) {
    const char* ahead = reinterpret_cast<const char*>(keys + (j + kAhead) * dim);
    const char* value = reinterpret_cast<const char*>(values + j * dim);
    for (size_t line = 0; line < dim * sizeof(T); line += 64) {
      __builtin_prefetch(ahead + line, 0, 3);
      __builtin_prefetch(value + line, 0, 2);
    }
    Floats key[kVectors];
    for (int i = 0; i < kVectors; ++i) key[i] = load(keys + j * dim + i * kLanes);
    for (int r = 0; r < kRows; ++r) {
      Floats product = key[0] * rows[r][0];
      for (int i = 1; i < kVectors; ++i) product += key[i] * rows[r][i];
      scores[r * kChunk + j] = sum(product);
    }
  }
}

// Sums of `count` values weighted by kRows rows of weights.
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

// Calls `block` for `rows` rows in blocks that fit the registers.
template <int kVectors, typename Block>
void for_row_blocks(int64_t rows, Block block) {
  int64_t r = 0;
  if constexpr (kVectors <= 4)
    for (; r + 4 <= rows; r += 4) block(r, std::integral_constant<int, 4>{});
  if constexpr (kVectors <= 4)
    for (; r + 3 <= rows; r += 3) block(r, std::integral_constant<int, 3>{});
  if constexpr (kVectors <= 8)
    for (; r + 2 <= rows; r += 2) block(r, std::integral_constant<int, 2>{});
  for (; r < rows; ++r) block(r, std::integral_constant<int, 1>{});
}

// Scores to weights e^(score − largest) of one row, zero outside what the rule and the position let it see.
inline void weigh_scores(float* row, int64_t position, const AttentionRule& rule, int64_t count, float* largest, float* total) {
  const int64_t end = std::clamp<int64_t>(position + 1, 0, count);
  const int64_t begin = rule.window > 0 ? std::clamp<int64_t>(position - rule.window + 1, 0, end) : 0;
  if (rule.softcap > 0)
    for (int64_t j = begin; j < end; ++j) row[j] = rule.softcap * std::tanh(row[j] / rule.softcap);
  const float none = -std::numeric_limits<float>::infinity();
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  std::fill(row, row + begin, none);
  std::fill(row + end, row + padded, none);
  Floats most = splat(none);
  for (int64_t j = 0; j < padded; j += kLanes) {
    const Floats x = load(row + j);
    most = select(x > most, x, most);
  }
  float lanes[kLanes];
  store(lanes, most);
  *largest = *std::max_element(lanes, lanes + kLanes);
  const float shift = std::isinf(*largest) ? 0.0f : *largest;
  Floats sums = {};
  for (int64_t j = 0; j < padded; j += kLanes) {
    const Floats weight = exponential(load(row + j) - shift);
    sums += weight;
    store(row + j, weight);
  }
  *total = sum(sums);
}

// Attends `rows` query rows (heads of one group × queries) to `count` keys from position `start` of one slot and head.
template <typename T, int kVectors>
void attend_chunk(const float* query, const T* keys, const T* values, const int64_t* positions, int64_t queries, int64_t rows,
                  int64_t start, int64_t count, const AttentionRule& rule, float* scores, const Partial& out) {
  constexpr int64_t dim = kVectors * kLanes;
  for_row_blocks<kVectors>(rows, [&](int64_t r, auto block) {
    score_rows<T, kVectors, block.value>(query + r * dim, keys, values, count, scores + r * kChunk);
  });
  for (int64_t r = 0; r < rows; ++r)
    weigh_scores(scores + r * kChunk, positions[r % queries] - start, rule, count, out.largest + r, out.total + r);
  for_row_blocks<kVectors>(rows, [&](int64_t r, auto block) {
    weigh_rows<T, kVectors, block.value>(scores + r * kChunk, values, count, out.weighted + r * dim);
  });
}

// Up to kTile consecutive tokens of one sequence with one key/value head, and one chunk of the keys they see.
struct Item {
  int64_t first, queries, kv, start, count;
};

// The items of a forward; those of one tile and head are adjacent. `groups` holds the first item of each such run.
void list_items(const Layout& s, std::vector<Item>* items, std::vector<int64_t>* groups) {
  items->clear();
  groups->clear();
  for (int64_t sequence = 0; sequence < s.sequences; ++sequence)
    for (int64_t first = s.offsets[sequence]; first < s.offsets[sequence + 1]; first += kTile) {
      const int64_t queries = std::min(kTile, s.offsets[sequence + 1] - first);
      const int64_t length = *std::max_element(s.positions + first, s.positions + first + queries) + 1;
      for (int64_t kv = 0; kv < s.kv_heads; ++kv) {
        groups->push_back(items->size());
        for (int64_t start = 0; start < length; start += kChunk)
          items->push_back({first, queries, kv, start, std::min(length - start, kChunk)});
      }
    }
  groups->push_back(items->size());
}

// Keys are cut into chunks so that one long sequence occupies every core; the partial results are joined afterwards
// (Dao et al., "Flash-Decoding for long-context inference", 2023). A sequence's cost follows its own length, not the longest.
template <typename T, int kVectors>
void attend(const T* query, const T* cache, T* out, const Layout& s, const AttentionRule& rule) {
  constexpr int64_t dim = kVectors * kLanes;
  const int64_t group = s.heads / s.kv_heads, most_rows = group * kTile, per_item = most_rows * (dim + 2);
  static thread_local std::vector<Item> items_of_thread;
  static thread_local std::vector<int64_t> groups_of_thread;
  static thread_local std::vector<float> partials;
  list_items(s, &items_of_thread, &groups_of_thread);
  const std::vector<Item>& items = items_of_thread;
  const std::vector<int64_t>& groups = groups_of_thread;
  if (static_cast<int64_t>(partials.size()) < static_cast<int64_t>(items.size()) * per_item) partials.resize(items.size() * per_item);
  float* base = partials.data();
  const auto partial = [base, per_item, most_rows](int64_t item) {
    float* p = base + item * per_item;
    return Partial{p, p + most_rows, p + 2 * most_rows};
  };
  int64_t work = 0;
  for (const Item& item : items) work += item.count * item.queries * group * dim;
#pragma omp parallel if (work > kSerialWork)
  {
    std::vector<float> scaled(most_rows * dim), scores(most_rows * kChunk);
#pragma omp for schedule(dynamic)
    for (int64_t n = 0; n < static_cast<int64_t>(items.size()); ++n) {
      const Item& item = items[n];
      const int64_t rows = group * item.queries;
      for (int64_t r = 0; r < rows; ++r) {
        const T* source = query + ((item.first + r % item.queries) * s.heads + item.kv * group + r / item.queries) * dim;
        for (int64_t i = 0; i < dim; i += kLanes) store(scaled.data() + r * dim + i, load(source + i) * rule.scale);
      }
      const T* keys = cache + ((s.token_slots[item.first] * s.kv_heads + item.kv) * s.span + item.start) * dim;
      const T* values = keys + s.slots * s.kv_heads * s.span * dim;
      attend_chunk<T, kVectors>(scaled.data(), keys, values, s.positions + item.first, item.queries, rows, item.start, item.count,
                                rule, scores.data(), partial(n));
    }
#pragma omp for
    for (int64_t g = 0; g < static_cast<int64_t>(groups.size()) - 1; ++g) {
      const Item& item = items[groups[g]];
      for (int64_t r = 0; r < group * item.queries; ++r) {
        float largest = -std::numeric_limits<float>::infinity(), total = 0;
        for (int64_t n = groups[g]; n < groups[g + 1]; ++n) largest = std::max(largest, partial(n).largest[r]);
        Floats sums[kVectors] = {};
        for (int64_t n = groups[g]; n < groups[g + 1]; ++n) {
          const Partial p = partial(n);
          // a chunk wholly outside the window has a total of 0; NaN must stay NaN
          const float weight = p.total[r] == 0 ? 0 : std::exp(std::isinf(p.largest[r]) ? 0 : p.largest[r] - largest);
          total += weight * p.total[r];
          for (int i = 0; i < kVectors; ++i) sums[i] += weight * load(p.weighted + r * dim + i * kLanes);
        }
        T* target = out + ((item.first + r % item.queries) * s.heads + item.kv * group + r / item.queries) * dim;
        for (int i = 0; i < kVectors; ++i) store(target + i * kLanes, sums[i] / total);
      }
    }
  }
}

template <typename T>
void attend_any(const T* query, const T* cache, T* out, const Layout& s, const AttentionRule& rule) {
  switch (s.dim / kLanes) {
    case 1: return attend<T, 1>(query, cache, out, s, rule);
    case 2: return attend<T, 2>(query, cache, out, s, rule);
    case 4: return attend<T, 4>(query, cache, out, s, rule);
    case 5: return attend<T, 5>(query, cache, out, s, rule);
    case 6: return attend<T, 6>(query, cache, out, s, rule);
    case 8: return attend<T, 8>(query, cache, out, s, rule);
    case 16: return attend<T, 16>(query, cache, out, s, rule);
  }
}

// Draws one token a row from softmax(logits / temperature) by inverting its cumulative sum in vocabulary order, or takes the first
// largest at temperature 0. The log-probability is that of the drawn token, at temperature 1 where the temperature is 0; NaN where
// the row has a logit that is NaN or +inf, or none that is finite.
template <typename T>
void draw_row(const T* logits, int64_t vocab, float temperature, double uniform, int64_t* token, float* logprob) {
  alignas(64) float lanes[kLanes];
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const int64_t whole = vocab / kLanes * kLanes;
  Floats largest_lanes = splat(-std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Floats x = load(logits + i);
    largest_lanes = select(x > largest_lanes, x, largest_lanes);
  }
  store(lanes, largest_lanes);
  float largest = *std::max_element(lanes, lanes + kLanes);
  const auto tail = [&](int64_t i) {  // the last lanes of a vocabulary that is no multiple of them
    alignas(64) T rest[kLanes];
    Floats x = splat(-std::numeric_limits<float>::infinity());
    for (int64_t k = 0; k < kLanes; ++k) rest[k] = logits[std::min(i + k, vocab - 1)];
    store(lanes, load(rest));
    for (int64_t k = vocab - i; k < kLanes; ++k) lanes[k] = -std::numeric_limits<float>::infinity();
    x = load(lanes);
    return x;
  };
  const auto at = [&](int64_t i) { return i < whole ? load(logits + i) : tail(i); };
  if (whole < vocab) {
    store(lanes, tail(whole));
    largest = std::max(largest, *std::max_element(lanes, lanes + kLanes));
  }
  const float inverse = temperature > 0 ? 1.0f / temperature : 1.0f;
  const auto weights = [&](int64_t i) { return exponential((at(i) - largest) * inverse); };
  static thread_local std::vector<double> ends;
  ends.clear();
  double total = 0;
  for (int64_t block = 0; block < vocab; block += kChunk) {
    Floats sums = {};
    for (int64_t i = block; i < std::min(block + kChunk, vocab); i += kLanes) sums += weights(i);
    total += sum(sums);
    ends.push_back(total);
  }
  *token = 0;
  *logprob = nan;
  if (!std::isfinite(total) || !std::isfinite(largest) || total <= 0) return;
  const auto score = [&](int64_t i) {
    store(lanes, at(i / kLanes * kLanes));
    return lanes[i % kLanes];
  };
  if (temperature <= 0) {
    for (int64_t i = 0; i < vocab; i += kLanes) {
      store(lanes, at(i));
      const float* found = std::find(lanes, lanes + kLanes, largest);
      if (found != lanes + kLanes) {
        *token = i + (found - lanes);
        break;
      }
    }
  } else {
    const double goal = uniform * total;
    const int64_t block = std::min<int64_t>(std::upper_bound(ends.begin(), ends.end(), goal) - ends.begin(), ends.size() - 1);
    double reached = block > 0 ? ends[block - 1] : 0;
    int64_t chosen = -1;
    for (int64_t i = block * kChunk; i < std::min((block + 1) * kChunk, vocab); i += kLanes) {
      store(lanes, weights(i));
      for (int64_t k = 0; k < kLanes && reached <= goal; ++k) {
        reached += lanes[k];
        if (lanes[k] > 0) chosen = i + k;  // rounding may leave the goal just past the block's end: then its last token
      }
      if (reached > goal) break;
    }
    if (chosen < 0)  // a block of weight zero, reached by rounding alone: the likeliest token
      for (chosen = 0; score(chosen) != largest;) ++chosen;
    *token = chosen;
  }
  *logprob = (score(*token) - largest) * inverse - static_cast<float>(std::log(total));
}

template <typename T>
void draw(const T* logits, int64_t rows, int64_t vocab, const float* temperatures, const double* uniforms, int64_t* tokens,
          float* logprobs) {
#pragma omp parallel for schedule(dynamic) if (rows > 1)
  for (int64_t r = 0; r < rows; ++r) draw_row(logits + r * vocab, vocab, temperatures[r], uniforms[r], tokens + r, logprobs + r);
}

}  // namespace

#define PACELINE_KERNELS(T, SUFFIX)                                                                                              \
  void paceline_rms_norm_##SUFFIX(const T* x, const T* gain, T* out, int64_t rows, int64_t width, float eps) {                   \
    rms_norm(x, gain, out, rows, width, eps);                                                                                    \
  }                                                                                                                              \
  void paceline_silu_gate_##SUFFIX(const T* x, T* out, int64_t rows, int64_t width) { silu_gate(x, out, rows, width); }          \
  void paceline_rotate_and_store_##SUFFIX(const T* joined, const T* cosines, const T* sines, const T* query_gain,                \
                                          const T* key_gain, float eps, T* query, T* cache, const Layout* layout) {              \
    rotate_and_store(joined, cosines, sines, query_gain, key_gain, eps, query, cache, *layout);                                  \
  }                                                                                                                              \
  void paceline_attend_##SUFFIX(const T* query, const T* cache, T* out, const Layout* layout, float scale, float softcap,        \
                                int64_t window) {                                                                                \
    attend_any(query, cache, out, *layout, AttentionRule{scale, softcap, window});                                               \
  }                                                                                                                              \
  void paceline_draw_##SUFFIX(const T* logits, int64_t rows, int64_t vocab, const float* temperatures, const double* uniforms,   \
                              int64_t* tokens, float* logprobs) {                                                                \
    draw(logits, rows, vocab, temperatures, uniforms, tokens, logprobs);                                                         \
  }

extern "C" {
PACELINE_KERNELS(float, float32)
PACELINE_KERNELS(bfloat16, bfloat16)
}
