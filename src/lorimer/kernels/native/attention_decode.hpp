// Attention of one new token of each row against its cache. Here the rows of the products are queries:
// there are few. Parts of the keys are separate tasks, put together at the end.
#pragma once

#include <math.h>

#include "attention.hpp"

namespace {

constexpr int64_t DECODE_KEYS = 512;  // of a task

template <class T>
struct DecodeRoom {
  float *wide_queries, *panel, *scores;
  Operand<T>* probs;

  DecodeRoom(Arena& arena, const Pack& pack) {
    wide_queries = arena.take<float>(pack.group() * pack.size);
    panel = arena.take<float>(larger(pack.size, DECODE_KEYS) * PANEL);
    scores = arena.take<float>(pack.group() * DECODE_KEYS);
    probs = arena.take<Operand<T>>(pack.group() * DECODE_KEYS);
  }
};

template <class T>
struct Decode {
  Pack pack;
  const T *q, *keys, *values;
  T* out;
  const int64_t* lengths;
  int64_t batch, capacity, q_stride;
  // Of each part of the keys: sums [D], padded to whole panels, then the largest exponent and the total.
  float* parts;

  int64_t padded_size() const { return round_up(pack.size, PANEL); }
  int64_t part_stride() const { return padded_size() + WIDTH; }
  int64_t splits() const { return ceil_div(capacity, DECODE_KEYS); }
  int64_t first_key(int64_t row) const { return larger<int64_t>(0, lengths[row] - pack.window); }
  float* part(int64_t row, int64_t head, int64_t split) const {
    return parts + ((row * pack.heads + head) * splits() + split) * part_stride();
  }

  void task(int64_t row, int64_t kv_head, int64_t split) const {
    const int64_t size = pack.size, group = pack.group();
    const int64_t begin = larger(first_key(row), split * DECODE_KEYS);
    const int64_t count = smaller(lengths[row], (split + 1) * DECODE_KEYS) - begin;
    if (count <= 0) return;
    const typename Blocks<T>::Use use;
    DecodeRoom<T> room = room_in<DecodeRoom<T>>(TASK, pack);
    const int64_t at = ((row * pack.kv_heads + kv_head) * capacity + begin) * size;
    const Rows queries = operand_rows(q + row * q_stride + kv_head * group * size, group, size, room.wide_queries);
    const int64_t padded = round_up(count, PANEL);
    for (int64_t key = 0; key < count; key += PANEL) {
      pack_columns(keys + at + key * size, size, size, smaller<int64_t>(PANEL, count - key), room.panel);
      product<PAIRED<T>>(queries, group, room.panel, units_of<T>(size), room.scores + key, DECODE_KEYS, false);
    }
    for (int64_t head = 0; head < group; ++head) {
      float* own = part(row, kv_head * group + head, split);
      softmax(room.scores + head * DECODE_KEYS, room.probs + head * DECODE_KEYS, count, padded, own + padded_size());
    }
    const Rows probs{reinterpret_cast<const char*>(room.probs), DECODE_KEYS * int64_t(sizeof(Operand<T>))};
    for (int64_t d = 0; d < size; d += PANEL) {
      pack_rows(values + at + d, size, count, smaller<int64_t>(PANEL, size - d), room.panel);
      product<PAIRED<T>>(probs, group, room.panel, units_of<T>(count), part(row, kv_head * group, split) + d,
                         splits() * part_stride(), false);
    }
  }

  // state: the largest exponent, then the sum of the powers.
  void softmax(float* scores, Operand<T>* probs, int64_t count, int64_t padded, float* state) const {
    for (int64_t i = count; i < padded; ++i) scores[i] = -__builtin_inff();
    const Vector scale = set(exponent_scale(pack));
    Vector top = set(LOWEST), total = zero();
    for (int64_t i = 0; i < padded; i += WIDTH) {
      if (pack.cap > 0) {
        const Vector raw = load(scores + i), capped = mul(set(pack.cap), tanh(mul(raw, set(pack.scale / pack.cap))));
        store_upto(scores + i, capped, larger<int64_t>(0, count - i));
      }
      top = max(load(scores + i), top);
    }
    state[0] = largest(top) * exponent_scale(pack);
    const Vector reference = set(-state[0]);
    for (int64_t i = 0; i < padded; i += WIDTH) {
      const Vector p = power_of_two<PAIRED<T>>(fma(load(scores + i), scale, reference));
      total = add(total, p);
      store(probs + i, p);
    }
    state[1] = sum(total);
  }

  // Puts the parts of one head together.
  void merge(int64_t row, int64_t head) const {
    const int64_t first = first_key(row) / DECODE_KEYS, last = ceil_div(lengths[row], DECODE_KEYS);
    const int64_t width = padded_size();
    float top = LOWEST, total = 0.0f;
    for (int64_t split = first; split < last; ++split) top = larger(top, part(row, head, split)[width]);
    for (int64_t split = first; split < last; ++split) {
      float* own = part(row, head, split);
      own[width] = exp2f(own[width] - top);
      total += own[width] * own[width + 1];
    }
    T* to = out + (row * pack.heads + head) * pack.size;
    for (int64_t d = 0; d < pack.size; d += WIDTH) {
      Vector value = zero();
      for (int64_t split = first; split < last; ++split) {
        const float* own = part(row, head, split);
        value = fma(set(own[width]), load(own + d), value);
      }
      store(to + d, mul(value, set(1.0f / total)));
    }
  }

  void run() {
    parts = scratch<float>(SUMS, batch * pack.heads * splits() * part_stride());
    const int64_t heads = pack.kv_heads;
    parallel_tasks(pack.threads, splits() * batch * heads, [&](int64_t task_number) {
      task(task_number / heads % batch, task_number % heads, task_number / heads / batch);
    });
    for (int64_t row = 0; row < batch; ++row)
      for (int64_t head = 0; head < pack.heads; ++head) merge(row, head);
  }
};

}  // namespace
