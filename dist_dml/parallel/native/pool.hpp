// The threads that sweep: torch's own OpenMP team, or a few that sleep between sweeps.
//
// torch brings a copy of libgomp, whose idle threads spin for up to 16 ms after every operation. A
// second team beside them had half a core in that time: 3 to 5 of the 35 ms of a step (2 Xeon
// cores, 11/2026). So jobs run on that very team, by the function that compilers call for
// `#pragma omp parallel`; compiling with -fopenmp would link a second runtime. Jobs are given to
// threads by number, so that results do not depend on who is faster.
#pragma once

#include <dlfcn.h>
#include <sys/types.h>
#include <unistd.h>

#include <atomic>
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

// Runs call(data) on `threads` threads of torch's OpenMP runtime; false if it has none.
inline bool run_on_team(int threads, void (*call)(void*), void* data) {
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  static const Parallel parallel = [] {
    // Looks through what libtorch_cpu itself depends on: another libgomp may be loaded as well.
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch ? reinterpret_cast<Parallel>(dlsym(torch, "GOMP_parallel")) : nullptr;
  }();
  // A forked process has libgomp's locks but not its threads.
  static const pid_t loaded_by = getpid();
  if (!parallel || loaded_by != getpid()) return false;
  parallel(call, data, threads, 0);
  return true;
}

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

  // Runs job(0) .. job(threads - 1) and waits for all; the first exception by number is thrown
  // again here.
  void run(int threads, const Job& job) {
    std::vector<std::exception_ptr> errors(threads);
    // The team may be smaller than asked (OMP_THREAD_LIMIT): whoever is free takes the next number.
    struct Shared {
      const Job& job;
      std::vector<std::exception_ptr>& errors;
      std::atomic<int> next{0};
    } shared{job, errors};
    auto take_jobs = [](void* data) {
      auto& all = *static_cast<Shared*>(data);
      int count = static_cast<int>(all.errors.size());
      for (int t = all.next++; t < count; t = all.next++) attempt(all.job, t, all.errors);
    };
    if (threads == 1) attempt(job, 0, errors);
    else if (!run_on_team(threads, take_jobs, &shared)) run_on_own(threads, job, errors);
    for (const std::exception_ptr& error : errors)
      if (error) std::rethrow_exception(error);
  }

 private:
  void run_on_own(int threads, const Job& job, std::vector<std::exception_ptr>& errors) {
    std::lock_guard<std::mutex> one_at_a_time(callers_);
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
  }

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
