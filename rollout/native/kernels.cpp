// Decode kernels for the CPU: the operations between a decoder layer's matrix products, each in one pass, and a
// drafter's whole step.
//
// Values are float32 or bfloat16 in memory and float32 in registers. Every function is called with the interpreter's
// lock released and forks the OpenMP team that torch uses.

#include "attention.h"
#include "decoder_layer.h"
#include "draw.h"
#include "drafting.h"
#include "lanes.h"
#include "product.h"
#include "product_dots.h"
#include "product_rows.h"

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
  void paceline_move_lines_##SUFFIX(T* const* layers, int64_t count, const int64_t* slots, const int64_t* sources,                \
                                    const int64_t* targets, int64_t moves, const Layout* layout) {                                 \
    move_lines(layers, count, slots, sources, targets, moves, *layout);                                                            \
  }                                                                                                                              \
  void paceline_decoder_layer_##SUFFIX(const DecoderLayer<T>* layer, const T* hidden, const T* cosines, const T* sines, T* cache,    \
                                       const Layout* layout, T* out) {                                                                \
    decoder_layer(*layer, hidden, cosines, sines, cache, *layout, out);                                                              \
  }                                                                                                                              \
  void paceline_draft_step_##SUFFIX(const DraftLayer<T>* layer, const int64_t* tokens, const int64_t* positions, const T* hidden,  \
                                    T* cache, const Layout* layout, const int64_t* keep, int64_t kept, T* out, T* logits) {        \
    draft_step(*layer, tokens, positions, hidden, cache, *layout, keep, kept, out, logits);                                        \
  }                                                                                                                              \
  void paceline_draft_chain_##SUFFIX(const DraftLayer<T>* layer, const int64_t* vocabulary, const int64_t* positions,               \
                                     const T* hidden, const T* logits, T* cache, const Layout* layout, int64_t depth,               \
                                     int64_t* drafted) {                                                                            \
    draft_chain(*layer, vocabulary, positions, hidden, logits, cache, *layout, depth, drafted);                                      \
  }                                                                                                                                  \
  void paceline_multiply_##SUFFIX(const T* x, int64_t rows, const Quantized* w, T* out) {                                          \
    multiply(x, rows, *w, static_cast<const T*>(nullptr), out);                                                                    \
  }                                                                                                                              \
  void paceline_follow_##SUFFIX(const T* logits, int64_t vocab, int64_t sequences, int64_t width, const int64_t* rows,             \
                                const int64_t* nodes, const int64_t* tokens, const int64_t* parents, const float* temperatures,    \
                                const double* uniforms, int64_t* path, int64_t* drawn, float* logprobs, int64_t* lengths) {        \
    follow(logits, vocab, sequences, width, rows, nodes, tokens, parents, temperatures, uniforms, path, drawn, logprobs, lengths); \
  }                                                                                                                              \
  void paceline_multiply_dots_##SUFFIX(const T* x, int64_t rows, const T* weight, int64_t outputs, int64_t inputs, const T* bias,  \
                                       const T* residual, T* out, int64_t stride) {                                                \
    multiply_dots(DotOperands<T>{x, weight, bias, residual, out, inputs, stride}, rows, outputs);                                  \
  }                                                                                                                              \
  void paceline_draw_##SUFFIX(const T* logits, int64_t rows, int64_t vocab, const float* temperatures, const double* uniforms,   \
                              int64_t* tokens, float* logprobs) {                                                                \
    draw(logits, rows, vocab, temperatures, uniforms, tokens, logprobs);                                                         \
  }

extern "C" {
PACELINE_KERNELS(float, float32)
PACELINE_KERNELS(bfloat16, bfloat16)

int paceline_tiles() {
#ifdef PACELINE_TILES
  return tiles_granted();
#else
  return 0;
#endif
}
void paceline_pack_weight(const bfloat16* weight, int64_t outputs, int64_t inputs, bfloat16* packed) {
#ifdef PACELINE_TILES
  pack_weight(weight, outputs, inputs, packed);
#else
  pack_weight_rows(weight, outputs, inputs, packed);
#endif
}
void paceline_multiply_packed(const bfloat16* x, int64_t rows, const bfloat16* packed, int64_t outputs, int64_t inputs,
                              const bfloat16* bias, const bfloat16* residual, bfloat16* out) {
  multiply_packed_any(x, rows, packed, outputs, inputs, bias, residual, out);
}
}
