// Backward passes of a decoder layer's operations between its products, for the update on a CPU. Activations and their
// gradients are bfloat16 in memory; everything is computed in float32.
#pragma once

#include <omp.h>

#include <utility>

#include "attention.h"

namespace {

// What a row's backward pass through a norm needs: with r = 1 / sqrt(mean(x²) + ε) and y = x r gain, the gradient of x is
// r gain dy − x r³ mean(gain dy x), and that of the gain x r dy.
struct NormSlope {
  float scale, back;  // r, and r³ mean(gain dy x)

  template <typename T>
  NormSlope(const bfloat16* x, const bfloat16* gain, const T* of_output, int64_t width, float eps) {
    Floats squares = {}, products = {};
    for (int64_t i = 0; i < width; i += kLanes) {
      const Floats v = load(x + i);
      squares += v * v;
      products += v * load(gain + i) * load(of_output + i);
    }
    scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + eps);
    back = scale * scale * scale * sum(products) / static_cast<float>(width);
  }
};

// Adds to `grad` [rows, width] the gradient of a norm's input, given that of its output. Writes the sum also as bfloat16,
// for the product that follows, and the gradient of the gain [width].
inline void norm_backward(const bfloat16* x, const bfloat16* gain, const bfloat16* of_output, int64_t rows, int64_t width, float eps,
                          float* grad, bfloat16* rounded, float* of_gain) {
  std::vector<float> partials(static_cast<size_t>(omp_get_max_threads()) * width, 0.0f);
#pragma omp parallel
  {
    float* own = partials.data() + omp_get_thread_num() * width;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const bfloat16 *in = x + row * width, *dy = of_output + row * width;
      const NormSlope slope(in, gain, dy, width, eps);
      for (int64_t i = 0; i < width; i += kLanes) {
        const Floats v = load(in + i), d = load(dy + i);
        const Floats total = load(grad + row * width + i) + d * load(gain + i) * slope.scale - v * slope.back;
        store(grad + row * width + i, total);
        store(rounded + row * width + i, total);
        store(own + i, load(own + i) + d * v * slope.scale);
      }
    }
  }
  for (int64_t i = 0; i < width; ++i) {
    of_gain[i] = 0;
    for (size_t at = i; at < partials.size(); at += width) of_gain[i] += partials[at];
  }
}

// Maps gate and up side by side [rows, 2 · width] and the gradient of silu(gate) · up [rows, width] to theirs.
inline void gate_backward(const bfloat16* x, const bfloat16* of_output, int64_t rows, int64_t width, bfloat16* out) {
#pragma omp parallel for if (rows * width > kSerialWork)
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < width; i += kLanes) {
      const int64_t at = row * 2 * width + i;
      const Floats gate = load(x + at), up = load(x + at + width), d = load(of_output + row * width + i);
      const Floats sigmoid = splat(1.0f) / (exponential(-gate) + 1.0f);
      store(out + at, d * up * sigmoid * (gate * (splat(1.0f) - sigmoid) + 1.0f));
      store(out + at + width, d * gate * sigmoid);
    }
}

// Loads a register that several products read; the compiler would load it again for each.
inline FloatPart held(const float* p) {
  FloatPart x = load_part(p);
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__AVX__)
  asm("" : "+x"(x));
#endif
  return x;
}

// The packed sequences of an update, one prompt after the other, each followed by its samples. A token sees the tokens
// before it in its piece, and those of a sample see their prompt.
struct Pieces {
  int64_t prompts;
  const int64_t* offsets;  // [prompts + 1], index of each prompt among the pieces; its samples follow it
  const int64_t* starts;   // [pieces + 1], index of each piece's first token
};

// The heads of one attention layer, and its queries, keys and values side by side [tokens, (heads + 2 kv_heads) dim] as
// the projections left them. Gains are null where there are no head norms.
struct Heads {
  int64_t heads, kv_heads;
  const bfloat16 *joined, *cosines, *sines, *query_gain, *key_gain;
  float eps;
};

// Computes the gradients of `Heads::joined` from that of the attention's output, one prompt with its samples and one
// key/value head at a time.
template <int kVectors>
class AttentionGradient {
 public:
  AttentionGradient(const Heads& heads, const AttentionRule& rule, const bfloat16* of_output, bfloat16* out)
      : h_(heads), rule_(rule), of_output_(of_output), out_(out), group_(heads.heads / heads.kv_heads), tokens_(std::max<int64_t>(1, 16 / group_)) {}

  // Writes the gradients of a prompt's and its samples' heads; adds those of the head norms' gains to `of_gains` [2][dim].
  void run(const Pieces& pieces, int64_t prompt, int64_t kv, float* of_gains) {
    const int64_t* starts = pieces.starts + pieces.offsets[prompt];
    const int64_t count = pieces.offsets[prompt + 1] - pieces.offsets[prompt];
    first_ = starts[0], length_ = starts[count] - first_, kv_ = kv, of_gains_ = of_gains;
    load_keys();
    for (int64_t piece = 0; piece < count; ++piece) {
      prompt_ = piece == 0 ? 0 : starts[1] - first_, own_ = starts[piece] - first_;
      for (int64_t token = own_; token < starts[piece + 1] - first_; token += tokens_)
        block(token, std::min(tokens_, starts[piece + 1] - first_ - token));
    }
    for (int64_t n = 0; n < length_; ++n) {
      rotate_back(of_keys_ + n * kDim, first_ + n, h_.heads + kv_, h_.key_gain, of_gains_ + kDim);
      round(of_values_ + n * kDim, first_ + n, h_.heads + h_.kv_heads + kv_);
    }
  }

 private:
  static constexpr int64_t kDim = kVectors * kLanes;
  static constexpr int64_t kKeysTogether = 2 * kPartLanes;  // keys whose scores are computed together
  static constexpr int64_t kSlack = 2 * kLanes;             // read and written past the last key

  // Keys from `source` on; their scores begin at `at` in a row.
  struct Range {
    int64_t source, length, at;
  };

  const Heads& h_;
  const AttentionRule& rule_;
  const bfloat16* of_output_;
  bfloat16* out_;
  const int64_t group_, tokens_;
  int64_t first_ = 0, length_ = 0, kv_ = 0, prompt_ = 0, own_ = 0, stride_ = 0;
  float *of_gains_ = nullptr, *keys_, *keys_by_dim_, *values_by_dim_, *of_keys_, *of_values_;
  float *queries_, *of_heads_, *of_queries_, *weights_, *of_scores_;
  std::vector<float> memory_;

  const bfloat16* head(int64_t token, int64_t index) const { return h_.joined + (token * (h_.heads + 2 * h_.kv_heads) + index) * kDim; }

  // Lays out the working memory and fills in keys and values.
  void load_keys() {
    const int64_t rows = group_ * tokens_, keys = length_ * kDim;
    stride_ = (length_ + kSlack + kLanes - 1) / kLanes * kLanes;
    const int64_t size = 3 * keys + 2 * stride_ * kDim + 3 * rows * kDim + 2 * rows * stride_ + kLanes;
    if (static_cast<int64_t>(memory_.size()) < size) memory_.resize(size);
    float* at = memory_.data();
    const auto take = [&](int64_t size) { return std::exchange(at, at + size); };
    keys_ = take(keys), of_keys_ = take(keys), of_values_ = take(keys);
    keys_by_dim_ = take(stride_ * kDim), values_by_dim_ = take(stride_ * kDim);
    queries_ = take(rows * kDim), of_heads_ = take(rows * kDim), of_queries_ = take(rows * kDim);
    weights_ = take(rows * stride_), of_scores_ = take(rows * stride_);
    std::fill(of_keys_, of_keys_ + 2 * keys, 0.0f);  // and of_values_ after it
    for (int64_t d = 0; d < kDim; ++d) {
      std::fill(keys_by_dim_ + d * stride_ + length_, keys_by_dim_ + (d + 1) * stride_, 0.0f);
      std::fill(values_by_dim_ + d * stride_ + length_, values_by_dim_ + (d + 1) * stride_, 0.0f);
    }
    for (int64_t n = 0; n < length_; ++n) {
      rotated(first_ + n, h_.heads + kv_, h_.key_gain, 1.0f, keys_ + n * kDim);
      const bfloat16* value = head(first_ + n, h_.heads + h_.kv_heads + kv_);
      for (int64_t d = 0; d < kDim; ++d) {
        keys_by_dim_[d * stride_ + n] = keys_[n * kDim + d];
        values_by_dim_[d * stride_ + n] = to_float(value[d]);
      }
    }
  }

  // Writes a rotated head as the forward rounds it, times a factor.
  void rotated(int64_t token, int64_t index, const bfloat16* gain, float factor, float* out) const {
    alignas(64) bfloat16 rounded[kMaxDim];
    rotate_head(head(token, index), gain, h_.eps, h_.cosines + token * kDim, h_.sines + token * kDim, rounded, kDim);
    for (int64_t d = 0; d < kDim; d += kLanes) store(out + d, load(rounded + d) * factor);
  }

  // Adds the gradients that `count` tokens from the given one on give rise to.
  void block(int64_t token, int64_t count) {
    const int64_t rows = group_ * count, own = token + count - own_, keys = prompt_ + own;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t n = first_ + token + r % count, index = kv_ * group_ + r / count;
      rotated(n, index, h_.query_gain, rule_.scale, queries_ + r * kDim);
      for (int64_t d = 0; d < kDim; d += kLanes) store(of_heads_ + r * kDim + d, load(of_output_ + (n * h_.heads + index) * kDim + d));
    }
    for_row_blocks<(kWide ? 4 : 2)>(rows, [&](int64_t r, auto size) {
      products<size.value>(r, 0, prompt_, 0);
      products<size.value>(r, own_, own, prompt_);
    });
    for (int64_t r = 0; r < rows; ++r) differentiate(weights_ + r * stride_, of_scores_ + r * stride_, prompt_ + token - own_ + r % count + 1, keys);
    for (const Range& range : {Range{0, prompt_, 0}, Range{own_, own, prompt_}}) {
      spread(weights_ + range.at, of_heads_, rows, of_values_ + range.source * kDim, range.length);
      spread(of_scores_ + range.at, queries_, rows, of_keys_ + range.source * kDim, range.length);
    }
    for_row_blocks<(kWide ? 4 : 2)>(rows, [&](int64_t r, auto size) { gather<size.value>(r, own); });
    for (int64_t r = 0; r < rows; ++r)
      rotate_back(of_queries_ + r * kDim, first_ + token + r % count, kv_ * group_ + r / count, h_.query_gain, of_gains_);
  }

  // Computes the scores of kRows rows against `length` keys, and the gradients of their weights.
  template <int kRows>
  void products(int64_t r, int64_t source, int64_t length, int64_t at) {
    for (int64_t j = 0; j < length; j += kKeysTogether) {
      FloatPart scores[kRows][2] = {}, grads[kRows][2] = {};
      for (int64_t d = 0; d < kDim; ++d) {
        const float *key = keys_by_dim_ + d * stride_ + source + j, *value = values_by_dim_ + d * stride_ + source + j;
        const FloatPart k0 = held(key), k1 = held(key + kPartLanes), v0 = held(value), v1 = held(value + kPartLanes);
        for (int i = 0; i < kRows; ++i) {
          const float q = queries_[(r + i) * kDim + d], g = of_heads_[(r + i) * kDim + d];
          scores[i][0] += k0 * q, scores[i][1] += k1 * q, grads[i][0] += v0 * g, grads[i][1] += v1 * g;
        }
      }
      for (int i = 0; i < kRows; ++i) {
        float *score = weights_ + (r + i) * stride_ + at + j, *grad = of_scores_ + (r + i) * stride_ + at + j;
        for (int p = 0; p < 2; ++p) store_part(score + p * kPartLanes, scores[i][p]), store_part(grad + p * kPartLanes, grads[i][p]);
      }
    }
  }

  // Turns a row of scores into weights, and the gradients of the weights into those of the scores. The row sees the keys
  // before `end`; up to `keys` the others count as zeros.
  void differentiate(float* row, float* grads, int64_t end, int64_t keys) const {
    const int64_t begin = rule_.window > 0 ? std::max<int64_t>(0, end - rule_.window) : 0, padded = (keys + kLanes - 1) / kLanes * kLanes;
    if (rule_.softcap > 0)
      for (int64_t j = begin; j < end; ++j) row[j] = rule_.softcap * std::tanh(row[j] / rule_.softcap);
    const float none = -std::numeric_limits<float>::infinity();
    std::fill(row, row + begin, none);
    std::fill(row + end, row + padded, none);
    Floats most = splat(none);
    for (int64_t j = 0; j < padded; j += kLanes) most = select(load(row + j) > most, load(row + j), most);
    const float largest = largest_of(most);
    Floats totals = {}, means = {};
    for (int64_t j = 0; j < padded; j += kLanes) {
      const Floats weight = exponential(load(row + j) - largest);
      totals += weight, means += weight * load(grads + j);
      if (rule_.softcap > 0) {  // the cap's derivative, before its score is overwritten
        const Floats share = load(row + j) * (1.0f / rule_.softcap), slope = splat(1.0f) - share * share;
        store(cap_slopes(j), select(weight > splat(0.0f), slope, splat(0.0f)));
      }
      store(row + j, weight);
    }
    const float inverse = 1.0f / sum(totals), mean = sum(means) * inverse;
    for (int64_t j = 0; j < padded; j += kLanes) {
      const Floats weight = load(row + j) * inverse;
      Floats grad = weight * (load(grads + j) - mean);
      if (rule_.softcap > 0) grad *= load(cap_slopes(j));
      store(row + j, weight), store(grads + j, grad);
    }
  }

  float* cap_slopes(int64_t j) const {
    static thread_local std::vector<float> slopes;
    if (static_cast<int64_t>(slopes.size()) < stride_) slopes.resize(stride_);
    return slopes.data() + j;
  }

  // Adds to `length` keys' gradients those that each row spreads over them by its weights.
  void spread(const float* weights, const float* rows_of, int64_t rows, float* target, int64_t length) {
    int64_t j = 0;
    for (; j + 4 <= length; j += 4) spread_over<4>(weights + j, rows_of, rows, target + j * kDim);
    for (; j < length; ++j) spread_over<1>(weights + j, rows_of, rows, target + j * kDim);
  }

  template <int kKeys>
  void spread_over(const float* weights, const float* rows_of, int64_t rows, float* target) {
    for_parts<(kWide ? 4 : 2)>([&](int64_t d, auto parts) {
      FloatPart sums[kKeys][parts.value];
      for (int k = 0; k < kKeys; ++k)
        for (int p = 0; p < parts.value; ++p) sums[k][p] = load_part(target + k * kDim + d + p * kPartLanes);
      for (int64_t r = 0; r < rows; ++r)
        for (int p = 0; p < parts.value; ++p) {
          const FloatPart x = held(rows_of + r * kDim + d + p * kPartLanes);
          for (int k = 0; k < kKeys; ++k) sums[k][p] += x * weights[r * stride_ + k];
        }
      for (int k = 0; k < kKeys; ++k)
        for (int p = 0; p < parts.value; ++p) store_part(target + k * kDim + d + p * kPartLanes, sums[k][p]);
    });
  }

  // Calls `body` for the registers of a head, at most kMost at a time, with the first dimension and their number.
  template <int kMost, int kFrom = 0, typename Body>
  static void for_parts(Body body) {
    constexpr int kAll = kVectors * kParts;
    if constexpr (kFrom < kAll) {
      constexpr int count = std::min(kMost, kAll - kFrom);
      body(kFrom * kPartLanes, std::integral_constant<int, count>{});
      for_parts<kMost, kFrom + count>(body);
    }
  }

  // Computes the gradients of kRows queries.
  template <int kRows>
  void gather(int64_t r, int64_t own) {
    for_parts<4>([&](int64_t d, auto parts) {
      FloatPart sums[kRows][parts.value] = {};
      for (const Range& range : {Range{0, prompt_, 0}, Range{own_, own, prompt_}})
        for (int64_t j = 0; j < range.length; ++j)
          for (int p = 0; p < parts.value; ++p) {
            const FloatPart key = held(keys_ + (range.source + j) * kDim + d + p * kPartLanes);
            for (int i = 0; i < kRows; ++i) sums[i][p] += key * of_scores_[(r + i) * stride_ + range.at + j];
          }
      for (int i = 0; i < kRows; ++i)
        for (int p = 0; p < parts.value; ++p) store_part(of_queries_ + (r + i) * kDim + d + p * kPartLanes, sums[i][p] * rule_.scale);
    });
  }

  // Writes the gradient of a head before rotation and norm, and adds that of the norm's gain.
  void rotate_back(float* grad, int64_t token, int64_t index, const bfloat16* gain, float* of_gain) {
    const bfloat16 *c = h_.cosines + token * kDim, *s = h_.sines + token * kDim;
    constexpr int64_t half = kDim / 2;
    for (int64_t d = 0; d < half; ++d) {
      const float low = grad[d], high = grad[d + half];
      grad[d] = low * to_float(c[d]) + high * to_float(s[d + half]);
      grad[d + half] = high * to_float(c[d + half]) - low * to_float(s[d]);
    }
    if (gain != nullptr) {
      const bfloat16* x = head(token, index);
      const NormSlope slope(x, gain, grad, kDim, h_.eps);
      for (int64_t d = 0; d < kDim; d += kLanes) {
        const Floats v = load(x + d), g = load(grad + d);
        store(of_gain + d, load(of_gain + d) + g * v * slope.scale);
        store(grad + d, g * load(gain + d) * slope.scale - v * slope.back);
      }
    }
    round(grad, token, index);
  }

  void round(const float* grad, int64_t token, int64_t index) {
    bfloat16* target = out_ + (token * (h_.heads + 2 * h_.kv_heads) + index) * kDim;
    for (int64_t d = 0; d < kDim; d += kLanes) store(target + d, load(grad + d));
  }
};

// Writes the gradient of `Heads::joined`. of_gains is [prompts × kv_heads][2][dim], zeros at first: the gradients of the
// head norms' gains, to be summed by the caller.
template <int kVectors>
void attention_backward(const Heads& heads, const Pieces& pieces, const AttentionRule& rule, const bfloat16* of_output, bfloat16* out,
                        float* of_gains) {
#pragma omp parallel
  {
    AttentionGradient<kVectors> gradient(heads, rule, of_output, out);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < pieces.prompts * heads.kv_heads; ++item)
      gradient.run(pieces, item / heads.kv_heads, item % heads.kv_heads, of_gains + item * 2 * kVectors * kLanes);
  }
}

inline void attention_backward_any(int64_t dim, const Heads& heads, const Pieces& pieces, const AttentionRule& rule,
                                   const bfloat16* of_output, bfloat16* out, float* of_gains) {
  with_vectors(dim, [&](auto vectors) { attention_backward<vectors.value>(heads, pieces, rule, of_output, out, of_gains); });
}

}  // namespace
