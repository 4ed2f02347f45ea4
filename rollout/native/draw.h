// Samples tokens from logits.
#pragma once

#include "lanes.h"

namespace {

constexpr int64_t kBlock = 256;  // tokens whose weights are summed together

// One row of logits with its softmax at a temperature (1 where it is 0). `total` sums the weights e^((logit − largest) /
// temperature) in blocks, whose ends are kept.
template <typename T>
class LogitRow {
 public:
  float largest = -std::numeric_limits<float>::infinity();
  const float inverse;
  double total = 0;

  LogitRow(const T* logits, int64_t vocab, float temperature, std::vector<double>* ends)
      : inverse(temperature > 0 ? 1.0f / temperature : 1.0f), logits_(logits), vocab_(vocab), whole_(vocab / kLanes * kLanes) {
    Floats most = splat(largest);
    for (int64_t i = 0; i < vocab; i += kLanes) {
      const Floats x = at(i);
      most = select(x > most, x, most);
    }
    largest = largest_of(most);
    ends->clear();
    for (int64_t block = 0; block < vocab; block += kBlock) {
      Floats sums = {};
      for (int64_t i = block; i < std::min(block + kBlock, vocab); i += kLanes) sums += weights(i);
      total += sum(sums);
      ends->push_back(total);
    }
  }

  bool finite() const { return std::isfinite(total) && std::isfinite(largest) && total > 0; }

  // Returns the logits of the tokens from i on; −inf past the vocabulary.
  Floats at(int64_t i) const { return i < whole_ ? load(logits_ + i) : tail(i); }

  Floats weights(int64_t i) const { return exponential((at(i) - largest) * inverse); }

  float logprob(int64_t token) const { return (to_float(logits_[token]) - largest) * inverse - static_cast<float>(std::log(total)); }

 private:
  const T* logits_;
  const int64_t vocab_, whole_;

  Floats tail(int64_t i) const {
    alignas(64) float lanes[kLanes];
    for (int64_t k = 0; k < kLanes; ++k) lanes[k] = i + k < vocab_ ? to_float(logits_[i + k]) : -std::numeric_limits<float>::infinity();
    return load(lanes);
  }
};

// Samples one token per row from softmax(logits / temperature) by inverting its cumulative sum in vocabulary order, or
// takes the first largest logit at temperature 0. The log-prob is that of the sampled token (at temperature 1 where the
// temperature is 0); it is NaN if the row has a logit that is NaN or +inf, or none that is finite.
template <typename T>
void draw_row(const T* logits, int64_t vocab, float temperature, double uniform, int64_t* token, float* logprob) {
  alignas(64) float lanes[kLanes];
  static thread_local std::vector<double> ends;
  const LogitRow<T> row(logits, vocab, temperature, &ends);
  *token = 0;
  *logprob = std::numeric_limits<float>::quiet_NaN();
  if (!row.finite()) return;
  if (temperature <= 0) {
    while (to_float(logits[*token]) != row.largest) ++*token;
  } else {
    const double goal = uniform * row.total;
    const int64_t block = std::min<int64_t>(std::upper_bound(ends.begin(), ends.end(), goal) - ends.begin(), ends.size() - 1);
    double reached = block > 0 ? ends[block - 1] : 0;
    int64_t chosen = -1;
    for (int64_t i = block * kBlock; i < std::min((block + 1) * kBlock, vocab); i += kLanes) {
      store(lanes, row.weights(i));
      for (int64_t k = 0; k < kLanes && reached <= goal; ++k) {
        reached += lanes[k];
        if (lanes[k] > 0) chosen = i + k;  // if rounding puts the goal just past the block's end, its last token
      }
      if (reached > goal) break;
    }
    if (chosen < 0)  // only rounding leads to a block of weight zero: take the most likely token
      for (chosen = 0; to_float(logits[chosen]) != row.largest;) ++chosen;
    *token = chosen;
  }
  *logprob = row.logprob(*token);
}

template <typename T>
void draw(const T* logits, int64_t rows, int64_t vocab, const float* temperatures, const double* uniforms, int64_t* tokens,
          float* logprobs) {
#pragma omp parallel for schedule(dynamic) if (rows > 1)
  for (int64_t r = 0; r < rows; ++r) draw_row(logits + r * vocab, vocab, temperatures[r], uniforms[r], tokens + r, logprobs + r);
}

// Descends each sequence's draft tree as long as the token sampled after a node is one of its children. Only rows on the
// way are sampled from.
//
// In: rows [S], the first of each sequence's 1 + nodes rows of logits; nodes [S]; tokens and parents [S, width];
// uniforms [S, width + 1], of which depth d uses number d. Out: path [S, width]; the tokens sampled along it and their
// log-probs [S, width + 1]; lengths [S], the number of nodes accepted.
template <typename T>
void follow(const T* logits, int64_t vocab, int64_t sequences, int64_t width, const int64_t* rows, const int64_t* nodes,
            const int64_t* tokens, const int64_t* parents, const float* temperatures, const double* uniforms, int64_t* path,
            int64_t* drawn, float* logprobs, int64_t* lengths) {
#pragma omp parallel for schedule(dynamic) if (sequences > 1)
  for (int64_t s = 0; s < sequences; ++s) {
    int64_t node = -1, depth = 0;
    for (;; ++depth) {
      int64_t* token = drawn + s * (width + 1) + depth;
      draw_row(logits + (rows[s] + 1 + node) * vocab, vocab, temperatures[s], uniforms[s * (width + 1) + depth], token,
               logprobs + s * (width + 1) + depth);
      int64_t next = -1;
      for (int64_t i = node + 1; i < nodes[s] && next < 0; ++i)
        if (parents[s * width + i] == node && tokens[s * width + i] == *token) next = i;
      if (next < 0) break;
      path[s * width + depth] = node = next;
    }
    lengths[s] = depth;
  }
}

}  // namespace
