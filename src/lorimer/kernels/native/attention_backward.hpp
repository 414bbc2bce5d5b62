// Attention backward: probabilities are computed again from the log-sum-exp.
//
// A task owns a chunk of keys and adds up the gradients of its keys and values over all blocks of
// queries that see it. A block's query gradient gets a part from each chunk; chunks add theirs in
// their order, which tasks keep by waiting for their turn. Every sum thus has one order, whatever the
// number of threads. Nobody waits for a task that has not begun: tasks begin in order.
#pragma once

#include <sched.h>

#include "attention.hpp"

namespace {

constexpr int64_t BACKWARD_COLUMNS = 128;
template <class T>
constexpr int64_t CHUNK = 256 / Blocks<T>::ROWS * Blocks<T>::ROWS;

template <class T>
struct BackwardRoom {
  static constexpr int64_t K_STRIDE = (CHUNK<T> / PER<T> + 15) / 16 * 16;
  T *gathered_q, *gathered_grad, *keys, *values;
  float *q_columns, *grad_columns, *q_rows, *grad_rows;
  float *wide_keys, *wide_values, *panel, *turned_keys;
  float *scores, *inner, *positions;
  Operand<T>*probs, *grad_scores;
  float *grad_panels, *sum_k, *sum_v;
  int64_t *first_strip, *last_strip;
  int64_t width;  // columns of the matrices of probabilities

  BackwardRoom(Arena& arena, const Pack& pack) {
    const int64_t size = pack.size, padded_size = round_up(size, PANEL);
    const bool widened = sizeof(Operand<T>) != sizeof(T);
    width = round_up(block_tokens(pack, BACKWARD_COLUMNS) * pack.group(), PANEL);
    gathered_q = arena.take<T>(width * size);
    gathered_grad = arena.take<T>(width * size);
    keys = arena.take<T>(CHUNK<T> * size);
    values = arena.take<T>(CHUNK<T> * size);
    q_columns = arena.take<float>(width * units_of<T>(size));
    grad_columns = arena.take<float>(width * units_of<T>(size));
    q_rows = arena.take<float>(units_of<T>(width) * padded_size);
    grad_rows = arena.take<float>(units_of<T>(width) * padded_size);
    wide_keys = arena.take<float>(widened ? CHUNK<T> * size : 0);
    wide_values = arena.take<float>(widened ? CHUNK<T> * size : 0);
    panel = arena.take<float>(K_STRIDE * PANEL);
    turned_keys = arena.take<float>(padded_size * K_STRIDE);
    scores = arena.take<float>(Blocks<T>::ROWS * PANEL);
    inner = arena.take<float>(Blocks<T>::ROWS * PANEL);
    positions = arena.take<float>(width);
    probs = arena.take<Operand<T>>(CHUNK<T> * width);
    grad_scores = arena.take<Operand<T>>(CHUNK<T> * width);
    grad_panels = arena.take<float>(CHUNK<T> / PER<T> * width);
    sum_k = arena.take<float>(CHUNK<T> * padded_size);
    sum_v = arena.take<float>(CHUNK<T> * padded_size);
    first_strip = arena.take<int64_t>(width / PANEL);
    last_strip = arena.take<int64_t>(width / PANEL);
  }
};

// What the tasks share.
struct BackwardTables {
  Block *blocks, *chunks;
  float *lse, *delta;  // [K][columns]: the exponent of two that divides, and sum(dO * O)
  float* sums;         // [K][columns / PANEL][D][PANEL]: the queries' gradients, turned
  int* turns;          // [blocks][K]: how many chunks have added theirs
  int64_t columns;

  BackwardTables(Arena& arena, const Pack& pack, int64_t block_count, int64_t chunk_count, int64_t all_columns)
      : columns(all_columns) {
    blocks = arena.take<Block>(block_count);
    chunks = arena.take<Block>(chunk_count);
    lse = arena.take<float>(columns * pack.kv_heads);
    delta = arena.take<float>(columns * pack.kv_heads);
    sums = arena.take<float>(columns * pack.kv_heads * pack.size);
    turns = arena.take<int>(block_count * pack.kv_heads);
  }
};

// Everything about one block against one chunk of `count` keys from `position` on.
struct Meeting {
  const Block& block;
  int64_t kv_head, position, count, strip;  // a strip is an even number of keys, a block of the products
  const float *lse, *delta;
  float* sums;
  bool onto;
};

template <class T>
struct Backward {
  using E = Operand<T>;
  Pack pack;
  const T *grad, *q, *k, *v, *out;
  const float* lse;
  T *grad_q, *grad_k, *grad_v;
  int64_t q_stride, kv_stride, grad_stride;

  // The columns' constants of one block.
  void prepare(const BackwardTables& tables, const Block& block, int64_t kv_head) const {
    const int64_t size = pack.size, group = pack.group(), padded = round_up(block.count * group, PANEL);
    float* exponent = tables.lse + kv_head * tables.columns + block.before;
    float* delta = tables.delta + kv_head * tables.columns + block.before;
    for (int64_t column = 0; column < padded; ++column) {
      exponent[column] = __builtin_inff();  // no probability in the padding
      delta[column] = 0.0f;
      if (column >= block.count * group) continue;
      const int64_t row = (block.begin + column / group) * pack.heads + kv_head * group + column % group;
      Vector dot = zero();
      for (int64_t d = 0; d < size; d += WIDTH) dot = fma(load(grad + row * size + d), load(out + row * size + d), dot);
      exponent[column] = lse[row] * LOG2E;
      delta[column] = sum(dot);
    }
  }

  // How many chunks before this one add to a block's query gradient.
  int64_t turn_of(const Block& chunk, const Block& block) const {
    const int64_t first = larger<int64_t>(0, pack.position(block.row, block.begin) - pack.window + 1);
    const int64_t length = chunk_length(chunk.row), number = (chunk.begin - pack.begin(chunk.row)) / length;
    if (chunk.row < 0) return number - first / length;
    const int64_t own = number - larger<int64_t>(0, first - pack.prefix) / length;
    if (first >= pack.prefix) return own;
    return own + ceil_div(pack.prefix, chunk_length(-1)) - first / chunk_length(-1);
  }
  int64_t chunk_length(int64_t row) const {
    return part_length(pack.end(row) - pack.begin(row), CHUNK<T>, Blocks<T>::ROWS);
  }

  void task(const BackwardTables& tables, int64_t block_count, const Block& chunk, int64_t kv_head) const {
    const int64_t size = pack.size, padded_size = round_up(size, PANEL);
    const typename Blocks<T>::Use use;
    BackwardRoom<T> room = room_in<BackwardRoom<T>>(TASK, pack);
    const int64_t position = pack.position(chunk.row, chunk.begin), last = position + chunk.count;
    gather_keys(pack, chunk.row, k + kv_head * size, kv_stride, position, last, room.keys);
    gather_keys(pack, chunk.row, v + kv_head * size, kv_stride, position, last, room.values);
    const Rows keys = operand_rows(room.keys, chunk.count, size, room.wide_keys);
    const Rows values = operand_rows(room.values, chunk.count, size, room.wide_values);
    const Rows turned =
        turned_rows(room.keys, chunk.count, size, room.panel, room.turned_keys, BackwardRoom<T>::K_STRIDE);
    std::memset(room.sum_k, 0, static_cast<size_t>(chunk.count * padded_size) * 4);
    std::memset(room.sum_v, 0, static_cast<size_t>(chunk.count * padded_size) * 4);
    const int64_t strip = round_up(Blocks<T>::next(chunk.count), 2);
    for (int64_t number = chunk.before; number < block_count; ++number) {
      const Block& block = tables.blocks[number];
      if (chunk.row >= 0 && block.row != chunk.row) break;
      const int64_t start = pack.position(block.row, block.begin);
      const Range range = seen(pack, Sight{start, start + block.count - 1}, position, chunk.count);
      if (range.first == range.last) continue;
      const int64_t at = kv_head * tables.columns + block.before;
      const int64_t turn = turn_of(chunk, block);
      const Meeting meeting{block, kv_head, position, chunk.count, strip, tables.lse + at, tables.delta + at,
                            tables.sums + at * size, turn > 0};
      load_queries(room, meeting);
      probabilities(room, meeting, keys, values);
      int* done = tables.turns + number * pack.kv_heads + kv_head;
      while (__atomic_load_n(done, __ATOMIC_ACQUIRE) != turn) sched_yield();
      add_to_queries(room, meeting, turned);
      __atomic_store_n(done, static_cast<int>(turn) + 1, __ATOMIC_RELEASE);
      add_to_keys(room, meeting, room.probs, room.grad_rows, room.sum_v);
      add_to_keys(room, meeting, room.grad_scores, room.q_rows, room.sum_k);
    }
    const Vector scale = set(pack.scale);
    for (int64_t row = 0; row < chunk.count; ++row) {
      const int64_t to = (chunk.begin + row) * grad_stride + kv_head * size, from = row * padded_size;
      for (int64_t d = 0; d < size; d += WIDTH) {
        store(grad_k + to + d, mul(load(room.sum_k + from + d), scale));
        store(grad_v + to + d, load(room.sum_v + from + d));
      }
    }
  }

  // The block's queries and output gradients as panels, for sums over features and over columns.
  void load_queries(const BackwardRoom<T>& room, const Meeting& at) const {
    const int64_t size = pack.size, each = pack.group() * size, padded = round_up(at.block.count * pack.group(), PANEL);
    gather(pack, at.block, q + at.kv_head * each, q_stride, padded, room.gathered_q);
    gather(pack, at.block, grad + at.kv_head * each, pack.heads * size, padded, room.gathered_grad);
    pack_queries(room.gathered_q, size, padded, room.q_columns);
    pack_queries(room.gathered_grad, size, padded, room.grad_columns);
    for (int64_t d = 0; d < size; d += PANEL) {
      const int64_t columns = smaller<int64_t>(PANEL, size - d), to = d * units_of<T>(room.width);
      pack_rows(room.gathered_q + d, size, padded, columns, room.q_rows + to);
      pack_rows(room.gathered_grad + d, size, padded, columns, room.grad_rows + to);
    }
    fill_positions(pack, at.block, padded, room.positions);
  }

  void probabilities(const BackwardRoom<T>& room, const Meeting& at, const Rows& keys, const Rows& values) const {
    const int64_t panels = ceil_div(at.block.count * pack.group(), PANEL), units = units_of<T>(pack.size);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const Sight sight = sight_of(pack, at.block, panel);
      const Range range = seen(pack, sight, at.position, at.count);
      room.first_strip[panel] = range.first / at.strip;
      room.last_strip[panel] = ceil_div(range.last, at.strip);
      for (int64_t number = room.first_strip[panel]; number < room.last_strip[panel]; ++number) {
        const int64_t key = number * at.strip, rows = smaller(at.strip, at.count - key), column = panel * PANEL;
        product<PAIRED<T>>(keys.from(key), rows, room.q_columns + column * units, units,
                           room.scores, PANEL, false);
        product<PAIRED<T>>(values.from(key), rows, room.grad_columns + column * units, units, room.inner, PANEL, false);
        cap_and_hide(pack, sight, room.positions + column, at.position + key, rows, room.scores);
        if (pack.cap > 0) strip_of<true>(room, at, key, rows, column);
        else strip_of<false>(room, at, key, rows, column);
      }
    }
  }

  // Probabilities and the scores' gradients of one strip of keys and one panel.
  template <bool CAPPED>
  void strip_of(const BackwardRoom<T>& room, const Meeting& at, int64_t key, int64_t rows, int64_t column) const {
    const Vector scale = set(exponent_scale(pack)), per_cap = set(CAPPED ? 1.0f / pack.cap : 0.0f);
    for (int64_t half = 0; half < PANEL; half += WIDTH) {
      const Vector exponent = sub(zero(), load(at.lse + column + half)), delta = load(at.delta + column + half);
      E* probs = room.probs + key * room.width + column + half;
      E* grads = room.grad_scores + key * room.width + column + half;
      float* panel = room.grad_panels + column * (CHUNK<T> / PER<T>) + half;
      for (int64_t row = 0; row < rows; row += 2) {
        Vector two[2] = {zero(), zero()};
        const int64_t here = smaller<int64_t>(2, rows - row);
        for (int64_t i = 0; i < here; ++i) {
          const Vector score = load(room.scores + (row + i) * PANEL + half);
          const Vector p = power_of_two<PAIRED<T>>(fma(score, scale, exponent));
          two[i] = mul(p, sub(load(room.inner + (row + i) * PANEL + half), delta));
          if (CAPPED) {
            // A hidden score is -infinity; its gradient is 0 whatever its slope.
            const Vector level = mul(max(set(-pack.cap), score), per_cap);
            two[i] = mul(two[i], sub(set(1.0f), mul(level, level)));
          }
          store(probs + (row + i) * room.width, p);
          store(grads + (row + i) * room.width, two[i]);
        }
        put_rows<PAIRED<T>>(panel, key + row, two[0], two[1]);
      }
    }
  }

  // dQ^T += K^T dS^T
  void add_to_queries(const BackwardRoom<T>& room, const Meeting& at, const Rows& turned) const {
    const int64_t size = pack.size, panels = ceil_div(at.block.count * pack.group(), PANEL);
    for (int64_t panel = 0; panel < panels; ++panel) {
      float* sums = at.sums + panel * PANEL * size;
      const int64_t first = room.first_strip[panel] * at.strip, last = room.last_strip[panel] * at.strip;
      const int64_t count = smaller(last, at.count) - first;
      if (count <= 0 && !at.onto) std::memset(sums, 0, static_cast<size_t>(size * PANEL) * 4);
      if (count <= 0) continue;
      const float* grads = room.grad_panels + (panel * (CHUNK<T> / PER<T>) + first / PER<T>)*PANEL;
      product<PAIRED<T>>(Rows{turned.at + first / PER<T> * 4, turned.stride}, size, grads, units_of<T>(count), sums,
                         PANEL, at.onto);
    }
  }

  // sums [keys][D] += turned [keys][columns] times rows [columns][D]
  void add_to_keys(const BackwardRoom<T>& room, const Meeting& at, const E* turned, const float* rows,
                   float* sums) const {
    const int64_t size = pack.size, padded_size = round_up(size, PANEL), width = room.width;
    const int64_t panels = ceil_div(at.block.count * pack.group(), PANEL), strips = ceil_div(at.count, at.strip);
    for (int64_t number = 0; number < strips; ++number) {
      int64_t first = 0, last = panels;
      auto sees = [&](int64_t panel) { return room.first_strip[panel] <= number && number < room.last_strip[panel]; };
      while (first < last && !sees(first)) ++first;
      while (first < last && !sees(last - 1)) --last;
      if (first == last) continue;
      const int64_t key = number * at.strip, count = smaller(at.strip, at.count - key);
      const Rows a{reinterpret_cast<const char*>(turned + key * width + first * PANEL), width * int64_t(sizeof(E))};
      for (int64_t d = 0; d < size; d += PANEL)
        product<PAIRED<T>>(a, count, rows + d * units_of<T>(width) + first * PANEL / PER<T> * PANEL,
                           (last - first) * PANEL / PER<T>, sums + key * padded_size + d, padded_size, true);
    }
  }

  void write_queries(const BackwardTables& tables, const Block& block, int64_t kv_head) const {
    const int64_t size = pack.size, group = pack.group(), columns = block.count * group;
    float* turned = scratch<float>(TASK, PANEL * size);
    const Vector scale = set(pack.scale);
    for (int64_t column = 0; column < columns; column += PANEL) {
      const int64_t here = smaller<int64_t>(PANEL, columns - column);
      turn_panel(tables.sums + (kv_head * tables.columns + block.before + column) * size, size, here, turned, size);
      for (int64_t i = 0; i < here; ++i) {
        const int64_t token = block.begin + (column + i) / group, head = kv_head * group + (column + i) % group;
        T* to = grad_q + token * grad_stride + head * size;
        for (int64_t d = 0; d < size; d += WIDTH) store(to + d, mul(load(turned + i * size + d), scale));
      }
    }
  }

  void run() const {
    const int64_t most = block_tokens(pack, BACKWARD_COLUMNS);
    const int64_t blocks = cut(pack, most, 1, nullptr), heads = pack.kv_heads;
    const int64_t chunks = cut(pack, CHUNK<T>, Blocks<T>::ROWS, nullptr);
    if (!blocks) return;
    Block* last = scratch<Block>(TASK, blocks);
    cut(pack, most, 1, last);
    const int64_t columns = last[blocks - 1].before + round_up(last[blocks - 1].count * pack.group(), PANEL);
    const BackwardTables tables = room_in<BackwardTables>(SUMS, pack, blocks, chunks, columns);
    cut(pack, most, 1, tables.blocks);
    cut(pack, CHUNK<T>, Blocks<T>::ROWS, tables.chunks);
    std::memset(tables.turns, 0, static_cast<size_t>(blocks * heads) * sizeof(int));
    // A chunk's `before` is now the first block of its row.
    for (int64_t chunk = 0, block = 0; chunk < chunks; ++chunk) {
      while (tables.blocks[block].row != tables.chunks[chunk].row) ++block;
      tables.chunks[chunk].before = block;
    }
    parallel_tasks(pack.threads, blocks * heads, [&](int64_t task_number) {
      prepare(tables, tables.blocks[task_number / heads], task_number % heads);
    });
    parallel_tasks(pack.threads, chunks * heads, [&](int64_t task_number) {
      task(tables, blocks, tables.chunks[task_number / heads], task_number % heads);
    });
    parallel_tasks(pack.threads, blocks * heads, [&](int64_t task_number) {
      write_queries(tables, tables.blocks[task_number / heads], task_number % heads);
    });
  }
};

}  // namespace
