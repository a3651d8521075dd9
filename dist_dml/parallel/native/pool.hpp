// A few threads that sleep between sweeps.
//
// Not OpenMP: torch brings a copy of libgomp of its own, and a second runtime would start a second
// team. Tiles are given to threads by number, so that results do not depend on who is faster.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace dist_dml {

// Subnormal results become 0 and operands count as 0 while this lives: a vanishing exponential
// would otherwise cost a hundred times an ordinary one.
class WithoutSubnormals {
 public:
#if defined(__SSE__)
  WithoutSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~WithoutSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

class Pool {
 public:
  using Job = std::function<void(int thread)>;

  // The process's pool. A fork has no threads but the caller's: it starts with a new pool, and
  // what it inherited is left as it is, locks included.
  static Pool& of_process() {
    static std::mutex guard;
    static Pool* pool = nullptr;
    static pid_t owner = 0;
    std::lock_guard<std::mutex> lock(guard);
    if (pool == nullptr || owner != getpid()) {
      pool = new Pool;  // Never deleted: its threads sleep until the process ends.
      owner = getpid();
    }
    return *pool;
  }

  // Runs job(0) .. job(threads - 1), job(0) on the calling thread, and waits for all; the first
  // exception by number is thrown again here.
  void run(int threads, const Job& job) {
    std::lock_guard<std::mutex> one_at_a_time(callers_);
    std::vector<std::exception_ptr> errors(threads);
    {
      std::lock_guard<std::mutex> lock(state_);
      while (static_cast<int>(num_workers_) < threads - 1) start_worker();
      job_ = &job;
      errors_ = &errors;
      threads_ = threads;
      pending_ = threads - 1;
      ++round_;
    }
    wake_.notify_all();
    attempt(job, 0, errors);
    std::unique_lock<std::mutex> lock(state_);
    done_.wait(lock, [this] { return pending_ == 0; });
    job_ = nullptr;
    for (const std::exception_ptr& error : errors)
      if (error) std::rethrow_exception(error);
  }

 private:
  static void attempt(const Job& job, int thread, std::vector<std::exception_ptr>& errors) {
    WithoutSubnormals flush;
    try {
      job(thread);
    } catch (...) {
      errors[thread] = std::current_exception();
    }
  }

  void start_worker() {
    int thread = num_workers_ + 1;
    std::thread([this, thread, seen = round_] { work(thread, seen); }).detach();
    ++num_workers_;
  }

  void work(int thread, uint64_t seen) {
    std::unique_lock<std::mutex> lock(state_);
    for (;;) {
      wake_.wait(lock, [&] { return round_ != seen; });
      seen = round_;
      if (thread >= threads_) continue;
      const Job* job = job_;
      std::vector<std::exception_ptr>* errors = errors_;
      lock.unlock();
      attempt(*job, thread, *errors);
      lock.lock();
      if (--pending_ == 0) done_.notify_one();
    }
  }

  std::mutex callers_, state_;
  std::condition_variable wake_, done_;
  const Job* job_ = nullptr;
  std::vector<std::exception_ptr>* errors_ = nullptr;
  int num_workers_ = 0, threads_ = 0, pending_ = 0;
  uint64_t round_ = 0;
};

}  // namespace dist_dml
