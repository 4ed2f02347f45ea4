// Kernels of an update's backward pass on a CPU, in bfloat16. They are a library of their own, because decoding does not
// need them.

#include "gradient_products.h"
#include "gradients.h"
#include "scores.h"

extern "C" {
void paceline_pack_transposed(const bfloat16* matrix, int64_t rows, int64_t columns, bfloat16* packed) {
  pack_transposed(matrix, rows, columns, packed);
}
void paceline_weight_gradient(const bfloat16* left, int64_t rows, const bfloat16* right, int64_t columns, int64_t steps, float* out) {
  weight_gradient(left, rows, right, columns, steps, out);
}
void paceline_norm_backward(const bfloat16* x, const bfloat16* gain, const bfloat16* of_output, int64_t rows, int64_t width, float eps,
                            float* grad, bfloat16* rounded, float* of_gain) {
  norm_backward(x, gain, of_output, rows, width, eps, grad, rounded, of_gain);
}
void paceline_gate_backward(const bfloat16* x, const bfloat16* of_output, int64_t rows, int64_t width, bfloat16* out) {
  gate_backward(x, of_output, rows, width, out);
}
void paceline_attention_backward(int64_t dim, const Heads* heads, const Pieces* pieces, float scale, float softcap, int64_t window,
                                 const bfloat16* of_output, bfloat16* out, float* of_gains) {
  attention_backward_any(dim, *heads, *pieces, AttentionRule{scale, softcap, window}, of_output, out, of_gains);
}
void paceline_score(const bfloat16* logits, int64_t rows, int64_t vocab, const int64_t* targets, float temperature, float* logprobs,
                    float* entropies, float* normalizers) {
  score(logits, rows, vocab, targets, temperature, logprobs, entropies, normalizers);
}
void paceline_score_backward(bfloat16* logits, int64_t rows, int64_t vocab, const int64_t* targets, float temperature,
                             const float* entropies, const float* normalizers, const float* of_logprobs, const float* of_entropies) {
  score_backward(logits, rows, vocab, targets, temperature, entropies, normalizers, of_logprobs, of_entropies);
}
}
