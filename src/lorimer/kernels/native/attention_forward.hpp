// Attention forward: a task is a block of queries of one group of heads, and goes through the keys that
// they see, step by step, with a running softmax.
#pragma once

#include <math.h>

#include "attention.hpp"

namespace {

// A probability may be up to 2^SLACK too large against its column's reference before all is rescaled.
constexpr float SLACK = 8.0f;

// Columns of a task, and keys of a step: scores of a panel against a step's keys stay in the L1 cache,
// the step's keys and values in the L2 cache.
constexpr int64_t FORWARD_COLUMNS = 384;
template <class T>
constexpr int64_t FORWARD_KEYS = 170 / Blocks<T>::ROWS * Blocks<T>::ROWS;

template <class T>
struct ForwardRoom {
  static constexpr int64_t V_STRIDE = (FORWARD_KEYS<T> / PER<T> + 15) / 16 * 16;
  T *gathered, *keys, *values;
  float *queries, *wide_keys, *panel, *turned_values, *scores, *probs;
  float *positions, *tops, *totals, *sums, *turned;

  ForwardRoom(Arena& arena, const Pack& pack) {
    const int64_t size = pack.size;
    const int64_t columns = round_up(block_tokens(pack, FORWARD_COLUMNS) * pack.group(), PANEL);
    gathered = arena.take<T>(columns * size);
    keys = arena.take<T>(FORWARD_KEYS<T> * size);
    values = arena.take<T>(FORWARD_KEYS<T> * size);
    queries = arena.take<float>(columns * units_of<T>(size));
    wide_keys = arena.take<float>(sizeof(Operand<T>) == sizeof(T) ? 0 : FORWARD_KEYS<T> * size);
    panel = arena.take<float>(V_STRIDE * PANEL);
    turned_values = arena.take<float>(round_up(size, PANEL) * V_STRIDE);
    scores = arena.take<float>(FORWARD_KEYS<T> * PANEL);
    probs = arena.take<float>(FORWARD_KEYS<T> * PANEL);
    positions = arena.take<float>(columns);
    tops = arena.take<float>(columns);    // the reference of each column's exponents
    totals = arena.take<float>(columns);  // sums of probabilities
    sums = arena.take<float>(columns * size);  // [panels][D][PANEL], not yet divided by the totals
    turned = arena.take<float>(PANEL * size);
  }
};

template <class T>
struct Forward {
  Pack pack;
  const T *q, *k, *v;
  int64_t q_stride, kv_stride;
  T* out;
  float* lse;

  void task(const Block& block, int64_t kv_head) const {
    const int64_t size = pack.size, padded = round_up(block.count * pack.group(), PANEL);
    const typename Blocks<T>::Use use;
    ForwardRoom<T> room = room_in<ForwardRoom<T>>(TASK, pack);
    gather(pack, block, q + kv_head * pack.group() * size, q_stride, padded, room.gathered);
    pack_queries(room.gathered, size, padded, room.queries);
    fill_positions(pack, block, padded, room.positions);
    for (int64_t i = 0; i < padded; i += WIDTH) {
      store(room.tops + i, set(LOWEST));
      store(room.totals + i, zero());
    }
    std::memset(room.sums, 0, static_cast<size_t>(padded * size) * 4);
    const int64_t start = pack.position(block.row, block.begin), last = start + block.count;
    const int64_t panels = ceil_div(block.count * pack.group(), PANEL);
    const T *keys = k + kv_head * size, *values = v + kv_head * size;
    for (int64_t at = larger<int64_t>(0, start - pack.window + 1); at < last; at += FORWARD_KEYS<T>) {
      const int64_t count = smaller(FORWARD_KEYS<T>, last - at);
      gather_keys(pack, block.row, keys, kv_stride, at, at + count, room.keys);
      gather_keys(pack, block.row, values, kv_stride, at, at + count, room.values);
      const Rows key = operand_rows(room.keys, count, size, room.wide_keys);
      const Rows value =
          turned_rows(room.values, count, size, room.panel, room.turned_values, ForwardRoom<T>::V_STRIDE);
      for (int64_t panel = 0; panel < panels; ++panel) {
        const Sight sight = sight_of(pack, block, panel);
        Range range = seen(pack, sight, at, count);
        range.first = range.first / 2 * 2;
        if (range.first < range.last) step(room, sight, panel, key, value, range, at);
      }
    }
    for (int64_t column = 0; column < padded; column += PANEL) finish(room, block, kv_head, column);
  }

  void step(const ForwardRoom<T>& room, const Sight& sight, int64_t panel, const Rows& key, const Rows& value,
            const Range& range, int64_t position) const {
    const int64_t size = pack.size, rows = range.last - range.first;
    const int64_t column = panel * PANEL, units = units_of<T>(size);
    product<PAIRED<T>>(key.from(range.first), rows, room.queries + column * units, units,
                       room.scores, PANEL, false);
    cap_and_hide(pack, sight, room.positions + column, position + range.first, rows, room.scores);
    float* sums = room.sums + column * size;
    raise(room, column, rows, sums);
    exponentials(room, column, rows);
    const Rows values{value.at + range.first / PER<T> * 4, value.stride};
    product<PAIRED<T>>(values, size, room.probs, units_of<T>(rows), sums, PANEL, true);
  }

  // Lifts the columns' references where scores have outgrown them, and scales what was summed.
  void raise(const ForwardRoom<T>& room, int64_t column, int64_t rows, float* sums) const {
    Vector top[2] = {set(LOWEST), set(LOWEST)}, old[2], factor[2];
    for (int64_t row = 0; row < rows; ++row)
      for (int half = 0; half < 2; ++half) top[half] = max(load(room.scores + row * PANEL + half * WIDTH), top[half]);
    for (int half = 0; half < 2; ++half) {
      old[half] = load(room.tops + column + half * WIDTH);
      top[half] = max(mul(top[half], set(exponent_scale(pack))), old[half]);
    }
    if (!(largest(max(sub(top[0], old[0]), sub(top[1], old[1]))) > SLACK)) return;
    for (int half = 0; half < 2; ++half) {
      factor[half] = power_of_two<false>(sub(old[half], top[half]));
      float* total = room.totals + column + half * WIDTH;
      store(total, mul(load(total), factor[half]));
      store(room.tops + column + half * WIDTH, top[half]);
    }
    for (int64_t i = 0; i < pack.size * PANEL; i += PANEL) {
      store(sums + i, mul(load(sums + i), factor[0]));
      store(sums + i + WIDTH, mul(load(sums + i + WIDTH), factor[1]));
    }
  }

  void exponentials(const ForwardRoom<T>& room, int64_t column, int64_t rows) const {
    const Vector scale = set(exponent_scale(pack));
    for (int64_t half = 0; half < PANEL; half += WIDTH) {
      const Vector top = sub(zero(), load(room.tops + column + half));
      Vector even_total = load(room.totals + column + half), odd_total = zero();
      const float* scores = room.scores + half;
      int64_t row = 0;
      for (; row + 2 <= rows; row += 2) {
        const Vector even = power_of_two<PAIRED<T>>(fma(load(scores + row * PANEL), scale, top));
        const Vector odd = power_of_two<PAIRED<T>>(fma(load(scores + (row + 1) * PANEL), scale, top));
        even_total = add(even_total, even);
        odd_total = add(odd_total, odd);
        put_rows<PAIRED<T>>(room.probs + half, row, even, odd);
      }
      if (row < rows) {
        const Vector even = power_of_two<PAIRED<T>>(fma(load(scores + row * PANEL), scale, top));
        even_total = add(even_total, even);
        put_rows<PAIRED<T>>(room.probs + half, row, even, zero());
      }
      store(room.totals + column + half, add(even_total, odd_total));
    }
  }

  void finish(const ForwardRoom<T>& room, const Block& block, int64_t kv_head, int64_t column) const {
    const int64_t size = pack.size, group = pack.group();
    const int64_t columns = smaller<int64_t>(PANEL, block.count * group - column);
    turn_panel(room.sums + column * size, size, columns, room.turned, size);
    for (int64_t i = 0; i < columns; ++i) {
      const int64_t token = block.begin + (column + i) / group, head = kv_head * group + (column + i) % group;
      const float total = room.totals[column + i];
      const Vector factor = set(1.0f / total);
      T* to = out + (token * pack.heads + head) * size;
      for (int64_t d = 0; d < size; d += WIDTH) store(to + d, mul(load(room.turned + i * size + d), factor));
      lse[token * pack.heads + head] = (room.tops[column + i] + log2f(total)) * LN2;
    }
  }

  void run() const {
    const int64_t most = block_tokens(pack, FORWARD_COLUMNS), count = cut(pack, most, 1, nullptr);
    Block* blocks = scratch<Block>(TABLES, count);
    cut(pack, most, 1, blocks);
    // One head after another, whose keys then stay in the cache. Late blocks have the most keys: they go
    // first, so that no thread is left with one at the end.
    parallel_tasks(pack.threads, count * pack.kv_heads,
                   [&](int64_t number) { task(blocks[count - 1 - number % count], number / count); });
  }
};

}  // namespace
