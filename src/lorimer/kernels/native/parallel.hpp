// Threads and scratch memory for the kernels.
//
// Where PyTorch brings an OpenMP runtime, its threads are used: a second team would fight the first
// for the cores. Elsewhere a small team of our own waits for work.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {
typedef void (*LorimerWork)(void* data, int thread, int threads);
// Calls work(data, 0..threads-1, threads), each on a thread of its own, and returns when all are done.
__attribute__((visibility("hidden"))) void lorimer_parallel(int threads, LorimerWork work, void* data);
// Memory of the calling thread that lasts until the next call with the same slot: at least `bytes`,
// aligned to 64. It is kept and reused, so a step takes no memory from the system. Ends the process
// if there is no memory left.
__attribute__((visibility("hidden"))) void* lorimer_scratch(int slot, size_t bytes);
// The next of the numbers 0, 1, 2, ... that the threads of one parallel call share.
__attribute__((visibility("hidden"))) int64_t lorimer_next(int64_t* counter);
}

namespace {

// body(thread, threads) on each thread.
template <class Body>
inline void parallel(int threads, const Body& body) {
  if (threads <= 1) {
    body(0, 1);
    return;
  }
  lorimer_parallel(
      threads, [](void* data, int thread, int count) { (*static_cast<const Body*>(data))(thread, count); },
      const_cast<Body*>(&body));
}

// body(task) for each task 0..tasks-1, whichever thread is free. Tasks must not depend on each other.
template <class Body>
inline void parallel_tasks(int threads, int64_t tasks, const Body& body) {
  if (tasks < threads) threads = static_cast<int>(tasks);
  int64_t counter = 0;
  parallel(threads, [&](int, int) {
    for (int64_t task = lorimer_next(&counter); task < tasks; task = lorimer_next(&counter)) body(task);
  });
}

// body(first, last) over parts of 0..count, one for each thread, each a multiple of `step` long.
template <class Body>
inline void parallel_range(int threads, int64_t count, int64_t step, const Body& body) {
  int64_t blocks = (count + step - 1) / step;
  if (blocks < threads) threads = static_cast<int>(blocks);
  parallel(threads, [&](int thread, int all) {
    int64_t first = blocks * thread / all * step, last = blocks * (thread + 1) / all * step;
    if (last > count) last = count;
    if (first < last) body(first, last);
  });
}

template <class T>
inline T* scratch(int slot, int64_t count) {
  return static_cast<T*>(lorimer_scratch(slot, static_cast<size_t>(count) * sizeof(T)));
}

}  // namespace
