// What is the same for every instruction set: what the processor has, threads, scratch memory.
#include "parallel.hpp"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifndef LORIMER_SOURCES
#define LORIMER_SOURCES "unknown"
#endif
#define EXPORT extern "C" __attribute__((visibility("default")))

// --- the processor ------------------------------------------------------------------------------

// A hash of the sources that this library was made from.
EXPORT const char* lorimer_sources() { return LORIMER_SOURCES; }

#if defined(__x86_64__)
static uint64_t enabled_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux hands out the tile registers only to processes that ask for them.
static bool may_use_tiles() {
#if defined(__linux__)
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
  return false;
#endif
}
#endif

// Bits: 1 AVX2 with FMA, 2 AVX-512 (F, BW, DQ, VL), 4 AVX-512-BF16, 8 AMX-BF16; each only if the
// operating system saves its registers.
EXPORT int lorimer_processor() {
  int found = 0;
#if defined(__x86_64__)
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
  bool fma = c & (1u << 12), saves = c & (1u << 27);
  if (!saves || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
  uint64_t state = enabled_state();
  bool wide = (state & 0x6) == 0x6, wider = wide && (state & 0xe0) == 0xe0;
  if (wide && fma && (b & (1u << 5))) found |= 1;
  constexpr uint32_t AVX512 = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);
  if ((found & 1) && wider && (b & AVX512) == AVX512) found |= 2;
  bool tiles = (d & (1u << 22)) && (d & (1u << 24)) && (state & 0x60000) == 0x60000;
  if ((found & 2) && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5))) found |= 4;
  if ((found & 4) && tiles && may_use_tiles()) found |= 8;
#endif
  return found;
}

// --- threads ------------------------------------------------------------------------------------

// GOMP_parallel and omp_get_thread_num of the runtime that PyTorch has loaded.
typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);
typedef int (*Number)();
static Parallel openmp_parallel = nullptr;
static Number openmp_thread = nullptr, openmp_threads = nullptr;

EXPORT void lorimer_use_openmp(void* parallel, void* thread, void* threads) {
  openmp_parallel = reinterpret_cast<Parallel>(parallel);
  openmp_thread = reinterpret_cast<Number>(thread);
  openmp_threads = reinterpret_cast<Number>(threads);
}

namespace {

struct Call {
  LorimerWork work;
  void* data;
  int threads;
};

void run_part(void* call) {
  const Call& mine = *static_cast<Call*>(call);
  // The runtime may give fewer threads than asked for: each then does more than one part.
  int step = openmp_threads();
  for (int part = openmp_thread(); part < mine.threads; part += step) mine.work(mine.data, part, mine.threads);
}

// Workers that sleep until there is work; the caller does part 0 itself.
class Team {
 public:
  void run(int threads, LorimerWork work, void* data) {
    std::lock_guard<std::mutex> one_at_a_time(turn_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < threads - 1) {
        int number = static_cast<int>(workers_.size()) + 1;
        // A new worker waits for the call after the one it was born in, which is this one.
        workers_.emplace_back([this, number, seen = calls_] { serve(number, seen); });
      }
      call_ = Call{work, data, threads};
      left_ = threads - 1;
      ++calls_;
    }
    wake_.notify_all();
    work(data, 0, threads);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return left_ == 0; });
  }

  ~Team() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

 private:
  void serve(int number, int64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return closing_ || calls_ != seen; });
      if (closing_) return;
      seen = calls_;
      Call call = call_;
      if (number >= call.threads) continue;
      lock.unlock();
      call.work(call.data, number, call.threads);
      lock.lock();
      if (--left_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  Call call_{};
  int64_t calls_ = 0;
  int left_ = 0;
  bool closing_ = false;
};

// Never destroyed: joining threads while a process ends can wait for ever after a fork.
Team& team() {
  static Team* only = new Team;
  return *only;
}

thread_local bool inside = false;

struct Guarded {
  LorimerWork work;
  void* data;
};

void guarded(void* data, int thread, int threads) {
  const Guarded& mine = *static_cast<Guarded*>(data);
  inside = true;
  mine.work(mine.data, thread, threads);
  inside = false;
}

}  // namespace

extern "C" void lorimer_parallel(int threads, LorimerWork work, void* data) {
  if (threads <= 1 || inside) {
    for (int part = 0; part < threads; ++part) work(data, part, threads);
    return;
  }
  Guarded mine{work, data};
  if (openmp_parallel) {
    Call call{guarded, &mine, threads};
    openmp_parallel(run_part, &call, static_cast<unsigned>(threads), 0);
  } else {
    team().run(threads, guarded, &mine);
  }
}

extern "C" int64_t lorimer_next(int64_t* counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }

// --- tapes --------------------------------------------------------------------------------------

// Runs calls one after the other. Each is the address of a kernel's _on_tape function, how many slots
// follow, and those. `length` counts everything.
EXPORT void lorimer_run_tape(const int64_t* tape, int64_t length) {
  typedef void (*OnTape)(const int64_t*);
  for (int64_t at = 0; at < length; at += 2 + tape[at + 1]) reinterpret_cast<OnTape>(tape[at])(tape + at + 2);
}

// --- scratch memory -----------------------------------------------------------------------------

namespace {

constexpr int SLOTS = 16;
constexpr size_t LINE = 64;

struct Scratch {
  void* at[SLOTS] = {};
  size_t size[SLOTS] = {};
  ~Scratch() {
    for (void* block : at) std::free(block);
  }
};

thread_local Scratch mine;

}  // namespace

extern "C" void* lorimer_scratch(int slot, size_t bytes) {
  if (mine.size[slot] < bytes) {
    std::free(mine.at[slot]);
    // Some room to grow, in whole pages.
    size_t size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    mine.at[slot] = std::aligned_alloc(LINE, size);
    mine.size[slot] = mine.at[slot] ? size : 0;
    if (!mine.at[slot]) std::abort();
  }
  return mine.at[slot];
}
