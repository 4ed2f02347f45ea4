// One step of a one-layer drafter over a few tokens, with 8-bit weights. Such a step is bound by reading weights, so
// half the bytes take half the time. Drafts are verified, so rounding can only cost acceptance.
#pragma once

#include "attention.h"
#include "int8_product.h"

namespace {

// EAGLE-3's layer: (norm of the token's embedding, norm of its parent's hidden state) → attention → gated MLP → head.
template <typename T>
struct DraftLayer {
  int64_t hidden, intermediate, vocab;
  Quantized qkv, o, gate_up, down, head;
  const T *embeddings, *of_embedding, *of_hidden, *of_mlp, *of_head, *cosines, *sines;
  float eps, scale;
};

// Runs the layer on tokens [N] with hidden states [N, hidden] at the layout's places; writes outputs [N, hidden], and
// logits [kept, vocab] of the tokens that `keep` names.
template <typename T>
void draft_step(const DraftLayer<T>& d, const int64_t* tokens, const int64_t* positions, const T* hidden, T* cache, const Layout& s,
                const int64_t* keep, int64_t kept, T* out, T* logits) {
  const int64_t n = s.tokens, all = (s.heads + 2 * s.kv_heads) * s.dim, inner = s.heads * s.dim;
  static thread_local std::vector<T> memory;
  memory.resize(n * (2 * d.hidden + all + 2 * inner + 2 * d.hidden + 3 * d.intermediate + 2 * s.dim));
  T* joined = memory.data();
  T* heads = joined + n * 2 * d.hidden;
  T* query = heads + n * all;
  T* attended = query + n * inner;
  T* middle = attended + n * inner;
  T* normed = middle + n * d.hidden;
  T* gates = normed + n * d.hidden;
  T* gated = gates + n * 2 * d.intermediate;
  T* angles = gated + n * d.intermediate;
  for (int64_t i = 0; i < n; ++i) {
    rms_norm_row(d.embeddings + tokens[i] * d.hidden, d.of_embedding, joined + i * 2 * d.hidden, d.hidden, d.eps);
    rms_norm_row(hidden + i * d.hidden, d.of_hidden, joined + (2 * i + 1) * d.hidden, d.hidden, d.eps);
    std::memcpy(angles + i * s.dim, d.cosines + positions[i] * s.dim, s.dim * sizeof(T));
    std::memcpy(angles + (n + i) * s.dim, d.sines + positions[i] * s.dim, s.dim * sizeof(T));
  }
  multiply(joined, n, d.qkv, static_cast<const T*>(nullptr), heads);
  rotate_and_store(heads, angles, angles + n * s.dim, static_cast<const T*>(nullptr), static_cast<const T*>(nullptr), 0.0f, query, cache, s);
  attend_any(query, cache, attended, s, AttentionRule{d.scale, 0.0f, 0});
  multiply(attended, n, d.o, hidden, middle);
  for (int64_t i = 0; i < n; ++i) rms_norm_row(middle + i * d.hidden, d.of_mlp, normed + i * d.hidden, d.hidden, d.eps);
  multiply(normed, n, d.gate_up, static_cast<const T*>(nullptr), gates);
  silu_gate(gates, gated, n, d.intermediate);
  multiply(gated, n, d.down, middle, out);
  for (int64_t i = 0; i < kept; ++i)
    rms_norm_row(out + keep[i] * d.hidden, d.of_head, normed + i * d.hidden, d.hidden, d.eps);
  multiply(normed, kept, d.head, static_cast<const T*>(nullptr), logits);
}

// Returns the column of the largest of `count` values; the first of several.
template <typename T>
int64_t likeliest(const T* values, int64_t count) {
  int64_t best = 0;
  for (int64_t i = 1; i < count; ++i)
    if (to_float(values[i]) > to_float(values[best])) best = i;
  return best;
}

// Drafts `depth` likeliest tokens of each sequence, one after another; the layout is that of each one's first draft
// token. Reads the outputs [N, hidden] and logits [N, vocab] at the newest tokens; writes target ids [N, depth].
template <typename T>
void draft_chain(const DraftLayer<T>& d, const int64_t* vocabulary, const int64_t* positions, const T* hidden, const T* logits, T* cache,
                 const Layout& s, int64_t depth, int64_t* drafted) {
  const int64_t n = s.tokens;
  std::vector<int64_t> tokens(n), all(n), at(positions, positions + n), seats(s.seats, s.seats + n);
  std::vector<int64_t> places(s.places, s.places + n), trunks(s.trunks, s.trunks + n);
  std::vector<T> states(hidden, hidden + n * d.hidden), outputs(n * d.hidden), scores(logits, logits + n * d.vocab);
  for (int64_t i = 0; i < n; ++i) all[i] = i;
  for (int64_t level = 0;; ++level) {
#pragma omp parallel for
    for (int64_t i = 0; i < n; ++i) tokens[i] = vocabulary[likeliest(scores.data() + i * d.vocab, d.vocab)];
    for (int64_t i = 0; i < n; ++i) drafted[i * depth + level] = tokens[i];
    if (level + 1 == depth) return;
    Layout step = s;
    step.seats = seats.data(), step.places = places.data(), step.trunks = trunks.data();
    draft_step(d, tokens.data(), at.data(), states.data(), cache, step, all.data(), n, outputs.data(), scores.data());
    states.swap(outputs);
    for (int64_t i = 0; i < n; ++i) ++at[i], ++seats[i], ++places[i], ++trunks[i];
  }
}

}  // namespace
