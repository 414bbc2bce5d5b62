// Causal attention of packed rows behind a prefix that they share: forward, backward, and one new token
// against a cache. Only blocks of scores that some query sees are computed, and none is kept.
//
// Letters: T tokens, N query heads, K key/value heads, D head size.
#include "attention_backward.hpp"
#include "attention_decode.hpp"
#include "attention_forward.hpp"

namespace {

inline Pack pack_of(const int64_t* offsets, int64_t rows, int64_t prefix, int64_t heads, int64_t kv_heads, int64_t size,
                    float scale, int64_t window, float cap, int threads) {
  return Pack{offsets, rows, prefix, heads, kv_heads, size, window < 0 ? ALL : window, scale, cap, threads};
}

template <class T>
void forward(const Pack& pack, const void* q, const void* k, const void* v, void* out, float* lse, int64_t q_stride,
             int64_t kv_stride) {
  Forward<T>{pack,     static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v),
             q_stride, kv_stride,                static_cast<T*>(out),     lse}
      .run();
}

template <class T>
void backward(const Pack& pack, const void* grad, const void* q, const void* k, const void* v, const void* out,
              const float* lse, void* grad_q, void* grad_k, void* grad_v, int64_t q_stride, int64_t kv_stride,
              int64_t grad_stride) {
  Backward<T>{pack,
              static_cast<const T*>(grad),
              static_cast<const T*>(q),
              static_cast<const T*>(k),
              static_cast<const T*>(v),
              static_cast<const T*>(out),
              lse,
              static_cast<T*>(grad_q),
              static_cast<T*>(grad_k),
              static_cast<T*>(grad_v),
              q_stride,
              kv_stride,
              grad_stride}
      .run();
}

template <class T>
void decode(const Pack& pack, const void* q, const void* keys, const void* values, void* out, const int64_t* lengths,
            int64_t batch, int64_t capacity, int64_t q_stride) {
  Decode<T>{pack,    static_cast<const T*>(q), static_cast<const T*>(keys), static_cast<const T*>(values),
            static_cast<T*>(out), lengths, batch, capacity, q_stride, nullptr}
      .run();
}

}  // namespace

// q, k and v are [T, heads, D] with a token's stride in elements; out is [T, N, D], lse [T, N] natural
// logarithms. Row r owns tokens offsets[r] to offsets[r + 1]; offsets[0] is the prefix's length. dtype 0
// is fp32, 1 bf16. No window: -1; no cap: 0.
LORIMER_EXPORT(attention_forward)
(const void* q, const void* k, const void* v, void* out, float* lse, const int64_t* offsets, int64_t rows,
 int64_t prefix, int64_t heads, int64_t kv_heads, int64_t size, int64_t q_stride, int64_t kv_stride, float scale,
 int64_t window, float cap, int dtype, int threads) {
  const Pack pack = pack_of(offsets, rows, prefix, heads, kv_heads, size, scale, window, cap, threads);
  if (dtype) forward<bf16>(pack, q, k, v, out, lse, q_stride, kv_stride);
  else forward<float>(pack, q, k, v, out, lse, q_stride, kv_stride);
}

// grad and out are [T, N, D]; the gradients are laid out as q, k and v, with a stride of their own.
LORIMER_EXPORT(attention_backward)
(const void* grad, const void* q, const void* k, const void* v, const void* out, const float* lse, void* grad_q,
 void* grad_k, void* grad_v, const int64_t* offsets, int64_t rows, int64_t prefix, int64_t heads, int64_t kv_heads,
 int64_t size, int64_t q_stride, int64_t kv_stride, int64_t grad_stride, float scale, int64_t window, float cap,
 int dtype, int threads) {
  const Pack pack = pack_of(offsets, rows, prefix, heads, kv_heads, size, scale, window, cap, threads);
  if (dtype) backward<bf16>(pack, grad, q, k, v, out, lse, grad_q, grad_k, grad_v, q_stride, kv_stride, grad_stride);
  else backward<float>(pack, grad, q, k, v, out, lse, grad_q, grad_k, grad_v, q_stride, kv_stride, grad_stride);
}

// q and out are [B, N, D], q with a row's stride in elements; keys and values [B, K, capacity, D]; row b
// sees its first lengths[b] keys.
LORIMER_EXPORT(attention_decode)
(const void* q, const void* keys, const void* values, void* out, const int64_t* lengths, int64_t batch,
 int64_t capacity, int64_t heads, int64_t kv_heads, int64_t size, int64_t q_stride, float scale, int64_t window,
 float cap, int dtype, int threads) {
  const Pack pack = pack_of(nullptr, 0, 0, heads, kv_heads, size, scale, window, cap, threads);
  if (dtype) decode<bf16>(pack, q, keys, values, out, lengths, batch, capacity, q_stride);
  else decode<float>(pack, q, keys, values, out, lengths, batch, capacity, q_stride);
}
LORIMER_ON_TAPE(attention_decode)

// One new token of each row into its caches [B, K, capacity, D]: key and value [B, K, D], with a row's
// stride in elements, at the place before lengths[b]. Elements have `bytes` bytes.
LORIMER_EXPORT(cache_append)
(const void* key, const void* value, int64_t stride, void* keys, void* values, const int64_t* lengths, int64_t batch,
 int64_t kv_heads, int64_t capacity, int64_t size, int bytes) {
  const size_t piece = static_cast<size_t>(size * bytes);
  for (int64_t row = 0; row < batch; ++row) {
    for (int64_t head = 0; head < kv_heads; ++head) {
      const int64_t from = (row * stride + head * size) * bytes;
      const int64_t to = ((row * kv_heads + head) * capacity + lengths[row] - 1) * size * bytes;
      std::memcpy(static_cast<char*>(keys) + to, static_cast<const char*>(key) + from, piece);
      std::memcpy(static_cast<char*>(values) + to, static_cast<const char*>(value) + from, piece);
    }
  }
}
LORIMER_ON_TAPE(cache_append)
