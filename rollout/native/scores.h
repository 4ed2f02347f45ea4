// Log-probs and entropies of given tokens, and their gradients, for the update on a CPU.
#pragma once

#include "draw.h"

namespace {

// Computes each row's log-prob of its target under softmax(logits / temperature), bit for bit as `draw_row` does, the
// entropy of that distribution, and the normalizer: log Σ e^(logit / temperature).
template <typename T>
void score(const T* logits, int64_t rows, int64_t vocab, const int64_t* targets, float temperature, float* logprobs, float* entropies,
           float* normalizers) {
#pragma omp parallel for schedule(dynamic)
  for (int64_t r = 0; r < rows; ++r) {
    static thread_local std::vector<double> ends;
    const LogitRow<T> row(logits + r * vocab, vocab, temperature, &ends);
    double mean = 0;  // of (logit − largest) / temperature
    for (int64_t block = 0; block < vocab; block += kBlock) {
      Floats sums = {};
      for (int64_t i = block; i < std::min(block + kBlock, vocab); i += kLanes) {
        const Floats weight = row.weights(i);
        sums += weight * select(weight > splat(0.0f), (row.at(i) - row.largest) * row.inverse, splat(0.0f));
      }
      mean += sum(sums);
    }
    const float nan = std::numeric_limits<float>::quiet_NaN(), log_total = std::log(row.total);
    logprobs[r] = row.finite() ? row.logprob(targets[r]) : nan;
    entropies[r] = row.finite() ? log_total - static_cast<float>(mean / row.total) : nan;
    normalizers[r] = row.largest * row.inverse + log_total;
  }
}

// Replaces each row of logits by its gradient: with p = softmax(logits / temperature) and H its entropy, that of the
// log-prob is (1[target] − p) / temperature and that of the entropy −p (log p + H) / temperature.
template <typename T>
void score_backward(T* logits, int64_t rows, int64_t vocab, const int64_t* targets, float temperature, const float* entropies,
                    const float* normalizers, const float* of_logprobs, const float* of_entropies) {
  const float inverse = 1.0f / temperature;
#pragma omp parallel for schedule(dynamic)
  for (int64_t r = 0; r < rows; ++r) {
    T* row = logits + r * vocab;
    const float by_logprob = of_logprobs[r], by_entropy = of_entropies[r];
    const auto gradient = [&](Floats x) {
      const Floats log_p = x * inverse - normalizers[r], p = exponential(log_p);
      const Floats more = select(p > splat(0.0f), (log_p + entropies[r]) * by_entropy, splat(0.0f));
      return -(more + by_logprob) * p * inverse;
    };
    const float target = to_float(row[targets[r]]);
    int64_t i = 0;
    for (; i + kLanes <= vocab; i += kLanes) store(row + i, gradient(load(row + i)));
    for (; i < vocab; ++i) row[i] = from_float<T>(gradient(splat(to_float(row[i])))[0]);
    row[targets[r]] = from_float<T>(gradient(splat(target))[0] + by_logprob * inverse);
  }
}

}  // namespace
