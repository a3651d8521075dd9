// The functions that `sweep_native.py` calls: both sweeps, and whether a dtype has kernels here.
// Raw pointers in, no exception out: 0, or 1 and what went wrong.

#include "backward.hpp"
#include "guarded.hpp"

using namespace dist_dml;

namespace {

// Calls with (Weight*, Operand*) of the problem's dtypes.
template <class Call>
void with_types(const Problem& problem, Call call) {
  auto with_operand = [&](auto* weight) {
    if (problem.operand == 2) call(weight, static_cast<Split*>(nullptr));
    else if (problem.operand == 1) call(weight, static_cast<Half*>(nullptr));
    else call(weight, static_cast<float*>(nullptr));
  };
  if (problem.weight_is_half) with_operand(static_cast<Half*>(nullptr));
  else with_operand(static_cast<float*>(nullptr));
}

}  // namespace

extern "C" {

int dist_dml_forward(const Problem* problem, const ForwardResult* result, char* message,
                     int64_t size) {
  return guarded(message, size, [&] {
    with_types(*problem, [&](auto* weight, auto* operand) {
      forward<std::remove_pointer_t<decltype(weight)>, std::remove_pointer_t<decltype(operand)>>(
          *problem, *result);
    });
  });
}

int dist_dml_backward(const Problem* problem, const BackwardTask* task, char* message,
                      int64_t size) {
  return guarded(message, size, [&] {
    with_types(*problem, [&](auto* weight, auto* operand) {
      backward<std::remove_pointer_t<decltype(weight)>, std::remove_pointer_t<decltype(operand)>>(
          *problem, *task);
    });
  });
}

// Floats that `kept` takes.
int64_t dist_dml_kept_size(const Problem* problem) {
  Tiling tiling(*problem);
  return tiling.num_chunks * (problem->num_classes + 1) * tiling.lane_ld;
}

// A 32 x 32 x 32 product of ones, really computed: processors without the instructions refuse.
int dist_dml_try_product(int64_t half, char* message, int64_t size) {
  return guarded(message, size, [&] {
    constexpr int64_t kSize = 32;
    std::vector<float> single(kSize * kSize, 1.0f), result(kSize * kSize, 0.0f);
    std::vector<Half> halves(kSize * kSize, half_of(1.0f));
    ReleaseProducts release(half != 0);
    if (half)
      multiply(kSize, kSize, kSize, halves.data(), kSize, halves.data(), kSize, result.data(),
               kSize, false);
    else
      multiply(kSize, kSize, kSize, single.data(), kSize, single.data(), kSize, result.data(),
               kSize, false);
    for (float x : result)
      if (x != kSize) throw std::runtime_error("a product of ones came out wrong");
  });
}

}  // extern "C"
