// The places of a forward's tokens in the slot cache, the functions that write and move their keys and values, and the
// work items of attention.
#pragma once

#include "elementwise.h"

namespace {

constexpr int64_t kChunk = 256;  // keys that one work item attends to

// A work item: a few consecutive tokens of one sequence with one key/value head, and one chunk of the keys they see.
struct Item {
  int64_t first, queries, kv, start, count;
  int64_t before;  // total work of the items before this one
};

// The tokens of one forward, sequence after sequence, and their places in the cache [2, slots, kv_heads, span, dim].
//
// A token's keys are written to its place. It sees all places before its trunk's end, and of the 64 places from there on
// those whose bit is set in its ancestors. This lets a draft tree's nodes lie side by side in the cache, though several
// may share a position in the text.
struct Layout {
  int64_t tokens, sequences, heads, kv_heads, dim, slots, span;
  const int64_t *token_slots, *seats, *places, *trunks;  // seats: positions counted from place 0
  const uint64_t* ancestors;
  const int64_t* offsets;  // [sequences + 1], index of each sequence's first token

  // Returns the index, among the heads of all tokens, of an item's row r; its rows are heads of one group × its tokens.
  int64_t head_of(const Item& item, int64_t r) const {
    return (item.first + r % item.queries) * heads + item.kv * (heads / kv_heads) + r / item.queries;
  }

  // Returns one past the last place that token n sees.
  int64_t end(int64_t n) const { return trunks[n] + (ancestors[n] == 0 ? 0 : 64 - __builtin_clzll(ancestors[n])); }

  // Returns how many keys token n sees if none is hidden by a window: its own position in the text, plus one.
  int64_t seen(int64_t n) const { return trunks[n] + __builtin_popcountll(ancestors[n]); }
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
      T* key = cache + ((s.token_slots[n] * s.kv_heads + h) * s.span + s.places[n]) * s.dim;
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

// The result of one work item: for every row the largest score, the sum of exponentials and the weighted sum of values.
struct Partial {
  float *largest, *total, *weighted;
};

// Lists the work items of a forward, of at most `most` tokens each. Their chunks are chunks of places, or, if
// `by_position`, of what a token sees in the order of the text. Items of the same tokens and head are adjacent, and
// `groups` holds the first item of each such run. Returns the total work in units of a key, where the fixed cost of an
// item counts as 64 keys and its tokens share most of the cost.
int64_t list_items(const Layout& s, int64_t most, bool by_position, std::vector<Item>* items, std::vector<int64_t>* groups) {
  items->clear();
  groups->clear();
  int64_t work = 0;
  for (int64_t sequence = 0; sequence < s.sequences; ++sequence)
    for (int64_t first = s.offsets[sequence]; first < s.offsets[sequence + 1]; first += most) {
      const int64_t queries = std::min(most, s.offsets[sequence + 1] - first);
      int64_t length = 0;
      for (int64_t n = first; n < first + queries; ++n) length = std::max(length, by_position ? s.seen(n) : s.end(n));
      for (int64_t kv = 0; kv < s.kv_heads; ++kv) {
        groups->push_back(items->size());
        for (int64_t start = 0; start < length; start += kChunk) {
          items->push_back({first, queries, kv, start, std::min(length - start, kChunk), work});
          work += (items->back().count + 64) * (8 + queries);
        }
      }
    }
  groups->push_back(items->size());
  return work;
}

// Moves keys and values of every layer's slot from the places `sources` to the places `targets`. Both are in increasing
// order with targets ≤ sources, so that no line is overwritten before it has been moved.
template <typename T>
void move_lines(T* const* layers, int64_t count_layers, const int64_t* slots, const int64_t* sources, const int64_t* targets,
                int64_t moves, const Layout& s) {
#pragma omp parallel for if (count_layers * moves * s.kv_heads * s.dim > kSerialWork)
  for (int64_t layer = 0; layer < count_layers; ++layer)
    for (int64_t part = 0; part < 2; ++part)
      for (int64_t m = 0; m < moves; ++m)
        for (int64_t h = 0; h < s.kv_heads; ++h) {
          T* line = layers[layer] + ((part * s.slots + slots[m]) * s.kv_heads + h) * s.span * s.dim;
          std::memcpy(line + targets[m] * s.dim, line + sources[m] * s.dim, s.dim * sizeof(T));
        }
}

}  // namespace
