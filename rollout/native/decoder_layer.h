// A decoder layer of a Llama-like model over a forward's tokens, in one call.
//
// It calls the kernels that are also called one by one, so that a layer computes the same bits either way.
#pragma once

#include <memory>
#include <new>

#include "attention.h"
#include "product.h"
#include "product_dots.h"

namespace {

// Linear layers of one input, whose outputs lie side by side: packed as one matrix, or up to three as they lie.
template <typename T>
struct Projection {
  const T *weights[3], *biases[3];
  int64_t outputs[3];
  int64_t count, inputs, packed;

  int64_t width() const { return outputs[0] + (count > 1 ? outputs[1] : 0) + (count > 2 ? outputs[2] : 0); }
};

// Computes the outputs of x [rows, inputs], plus a residual if it is not null; out is [rows, width].
template <typename T>
void project(const Projection<T>& p, const T* x, int64_t rows, const T* residual, T* out) {
  if constexpr (std::is_same_v<T, bfloat16>)
    if (p.packed) return multiply_packed_any(x, rows, p.weights[0], p.outputs[0], p.inputs, p.biases[0], residual, out);
  const int64_t stride = p.width();
  for (int64_t i = 0, first = 0; i < p.count; first += p.outputs[i++]) {
    const T* rest = residual == nullptr ? nullptr : residual + first;
    multiply_dots(DotOperands<T>{x, p.weights[i], p.biases[i], rest, out + first, p.inputs, stride}, rows, p.outputs[i]);
  }
}

template <typename T>
struct DecoderLayer {
  Projection<T> qkv, o, gate_up, down;
  const T *attention_gain, *mlp_gain;
  const T *query_gain, *key_gain;  // null if heads are not normalized
  float attention_eps, mlp_eps, head_eps;
  AttentionRule rule;
};

// Memory of one call, handed out in pieces that start at a cache line.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : memory_(new (std::align_val_t(64)) T[count]), next_(memory_.get()) {}

  T* take(int64_t count) {
    T* piece = next_;
    next_ += (count + 63) / 64 * 64;
    return piece;
  }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  std::unique_ptr<T[], Free> memory_;
  T* next_;
};

// Computes the layer's output [N, hidden] for hidden states of that shape; stores keys and values at the tokens' places.
template <typename T>
void decoder_layer(const DecoderLayer<T>& d, const T* hidden, const T* cosines, const T* sines, T* cache, const Layout& s, T* out) {
  const int64_t n = s.tokens, width = d.qkv.inputs, all = d.qkv.width(), inner = s.heads * s.dim;
  const int64_t gates_width = d.gate_up.width(), intermediate = gates_width / 2;
  Scratch<T> scratch(n * (2 * width + std::max(all, gates_width) + std::max(2 * inner, intermediate)) + 5 * 64);
  T* middle = scratch.take(n * width);
  T* normed = scratch.take(n * width);
  T* joined = scratch.take(n * std::max(all, gates_width));
  T* query = scratch.take(n * std::max(2 * inner, intermediate));
  T* attended = query + n * inner;
  rms_norm(hidden, d.attention_gain, normed, n, width, d.attention_eps);
  project(d.qkv, normed, n, static_cast<const T*>(nullptr), joined);
  rotate_and_store(joined, cosines, sines, d.query_gain, d.key_gain, d.head_eps, query, cache, s);
  attend_any(query, cache, attended, s, d.rule);
  project(d.o, attended, n, hidden, middle);
  rms_norm(middle, d.mlp_gain, normed, n, width, d.mlp_eps);
  T *gates = joined, *gated = query;
  project(d.gate_up, normed, n, static_cast<const T*>(nullptr), gates);
  silu_gate(gates, gated, n, intermediate);
  project(d.down, gated, n, middle, out);
}

}  // namespace
