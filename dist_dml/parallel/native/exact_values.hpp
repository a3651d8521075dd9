// The value of a pair of rows, as `retrieval/exact_values.py` defines it: the same bits everywhere.
//
// Terms are float64; term d is added to sum d % 32 in the order of d; sums are then added in halves.
// A product of two float32 is exact in float64, so inner products have no rounding but the sums'.
// Compiled without fused operations (native_build.py): squares would be rounded once, not twice.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace dist_dml {

constexpr int64_t kSums = 32;
constexpr int64_t kDoubles = 8;

typedef float FloatEight __attribute__((vector_size(32)));
typedef double DoubleEight __attribute__((vector_size(64)));

// Subnormal numbers count as what they are while this lives; a sweep's threads flush them.
class WithSubnormals {
 public:
#if defined(__SSE__)
  WithSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~0x8040u); }
  ~WithSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

inline DoubleEight in_double(const float* from) {
  FloatEight x;
  __builtin_memcpy(&x, from, sizeof(x));
  return __builtin_convertvector(x, DoubleEight);
}

template <bool kSquares>
inline void add_terms(const float* a, const float* b, DoubleEight (&sums)[kSums / kDoubles]) {
  for (int64_t i = 0; i < kSums / kDoubles; ++i) {
    DoubleEight x = in_double(a + kDoubles * i), y = in_double(b + kDoubles * i);
    if constexpr (kSquares) {
      DoubleEight gap = x - y;
      sums[i] += gap * gap;
    } else {
      sums[i] += x * y;
    }
  }
}

template <bool kSquares>
inline double pair_value(const float* a, const float* b, int64_t features) {
  DoubleEight sums[kSums / kDoubles] = {};
  int64_t d = 0;
  for (; d + kSums <= features; d += kSums) add_terms<kSquares>(a + d, b + d, sums);
  if (d < features) {  // Filled up with zeros, whose terms change nothing.
    float rest_a[kSums] = {}, rest_b[kSums] = {};
    std::memcpy(rest_a, a + d, (features - d) * sizeof(float));
    std::memcpy(rest_b, b + d, (features - d) * sizeof(float));
    add_terms<kSquares>(rest_a, rest_b, sums);
  }
  double single[kSums];
  std::memcpy(single, sums, sizeof(single));
  for (int64_t step = kSums / 2; step >= 1; step /= 2)
    for (int64_t i = 0; i < step; ++i) single[i] += single[i + step];
  return single[0];
}

// Smaller is nearer: the squared distance, or the inner product's opposite.
inline double pair_key(const float* a, const float* b, int64_t features, bool squares) {
  return squares ? pair_value<true>(a, b, features) : -pair_value<false>(a, b, features);
}

}  // namespace dist_dml
