// Matrix products of blocks that lie in the cache, and the rows in the layouts that they read.
//
// oneDNN's micro-kernels, by way of torch, which has them linked in: code made at run time for the
// processor and each size (AVX2, AVX-512, AMX), kept by each thread. bfloat16 products read their
// second operand in pairs, (K/2, N, 2), and add up in float32.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <cstring>

#include "problem.hpp"

namespace dist_dml {

// C (M, N) = A (M, K) B (K, N), added to C if `add`; ld: distance of rows.
inline void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t ld_a, const float* b,
                     int64_t ld_b, float* c, int64_t ld_c, bool add) {
  at::native::cpublas::brgemm(m, n, k, ld_a, ld_b, ld_c, add, a, b, c, false);
}

inline void multiply(int64_t m, int64_t n, int64_t k, const Half* a, int64_t ld_a, const Half* b,
                     int64_t ld_b, float* c, int64_t ld_c, bool add) {
  at::native::cpublas::brgemm(m, n, k, ld_a, ld_b, ld_c, add,
                              reinterpret_cast<const at::BFloat16*>(a),
                              reinterpret_cast<const at::BFloat16*>(b), c, true);
}

// A float32 as the sum of two bfloat16, which keeps 16 bits of its mantissa. A product takes three:
// high x high, high x rest, rest x high; rest x rest is below what is kept.
struct Split {};

struct SplitPointer {
  Half *high, *rest;
  SplitPointer operator+(int64_t count) const { return {high + count, rest + count}; }
};

inline void multiply(int64_t m, int64_t n, int64_t k, SplitPointer a, int64_t ld_a,
                     SplitPointer b, int64_t ld_b, float* c, int64_t ld_c, bool add) {
  multiply(m, n, k, a.high, ld_a, b.rest, ld_b, c, ld_c, add);
  multiply(m, n, k, a.rest, ld_a, b.high, ld_b, c, ld_c, true);
  multiply(m, n, k, a.high, ld_a, b.high, ld_b, c, ld_c, true);
}

// How operands of a kind are pointed at, and memory for them.
template <class Operand>
struct Operands {
  using Pointer = Operand*;
  explicit Operands(int64_t count) : data(count) {}
  Pointer get() const { return data.get(); }
  Buffer<Operand> data;
};

template <>
struct Operands<Split> {
  using Pointer = SplitPointer;
  explicit Operands(int64_t count) : high(count), rest(count) {}
  Pointer get() const { return {high.get(), rest.get()}; }
  Buffer<Half> high, rest;
};

template <class Operand>
using PointerTo = typename Operands<Operand>::Pointer;

// Gives the processor's AMX registers back when a thread is through with its products.
class ReleaseProducts {
 public:
  explicit ReleaseProducts(bool half) : half_(half) {}
  ~ReleaseProducts() { at::native::cpublas::brgemm_release(half_); }

 private:
  bool half_;
};

inline Half half_of(float x) {
  return {static_cast<uint16_t>(nearest_half(all_lanes(x))[0] >> 16)};
}

inline float widened(Half x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float single;
  std::memcpy(&single, &bits, sizeof(single));
  return single;
}

inline void set(float* to, float x) { *to = x; }
inline void set(Half* to, float x) { *to = half_of(x); }
inline void set(SplitPointer to, float x) {
  *to.high = half_of(x);
  *to.rest = half_of(x - widened(*to.high));
}

// The rows, chunk by chunk, as second operands; what fills a chunk up is zeros. `Operand` is Half
// or Split; float32 stands below.
template <class Operand>
class PackedRows {
 public:
  PackedRows(const Problem& problem, const Tiling& tiling, bool with_plain)
      : problem_(problem),
        tiling_(tiling),
        depth(tiling.features),
        with_plain_(with_plain),
        transposed_(tiling.num_chunks * depth * tiling.lane_ld),
        plain_(with_plain ? tiling.num_chunks * tiling.lanes * tiling.feature_ld : 0) {}

  void pack(int64_t chunk) {
    int64_t lanes = tiling_.lanes, ld = tiling_.lane_ld, d_end = problem_.num_features;
    int64_t count = tiling_.chunk_rows(problem_, chunk);
    const float* from = problem_.rows + chunk * tiling_.chunk * d_end;
    auto across = transposed(chunk), along = plain_.get();
    if (with_plain_) along = plain(chunk);
    for (int64_t i = 0; i < lanes; ++i)
      for (int64_t d = 0; d < depth; ++d) {
        float x = i < count && d < d_end ? from[i * d_end + d] : 0.0f;
        set(across + ((d / 2 * ld + i) * 2 + d % 2), x);
        if (with_plain_) set(along + ((i / 2 * plain_ld() + d) * 2 + i % 2), x);
      }
  }

  // Pairs of features (depth / 2, lanes, 2) at the distance of `lane_ld` pairs, for logits.
  PointerTo<Operand> transposed(int64_t chunk) const {
    return transposed_.get() + chunk * depth * tiling_.lane_ld;
  }

  // Pairs of rows (count / 2, depth, 2) at the distance of `plain_ld`, for weights' gradients.
  PointerTo<Operand> plain(int64_t chunk) const {
    return plain_.get() + chunk * tiling_.lanes * plain_ld();
  }
  int64_t plain_ld() const { return tiling_.feature_ld; }
  int64_t plain_count(int64_t) const { return tiling_.lanes; }

 private:
  const Problem& problem_;
  const Tiling& tiling_;

 public:
  const int64_t depth;  // K of the logits' product, N of the gradient's.

 private:
  bool with_plain_;
  Operands<Operand> transposed_, plain_;
};

template <>
class PackedRows<float> {
 public:
  PackedRows(const Problem& problem, const Tiling& tiling, bool)
      : problem_(problem),
        tiling_(tiling),
        depth(problem.num_features),
        transposed_(tiling.num_chunks * depth * tiling.lane_ld) {}

  void pack(int64_t chunk) {
    float* to = transposed_.get() + chunk * depth * tiling_.lane_ld;
    const float* from = plain(chunk);
    int64_t count = tiling_.chunk_rows(problem_, chunk);
    for (int64_t d = 0; d < depth; ++d)
      for (int64_t i = 0; i < tiling_.lanes; ++i)
        to[d * tiling_.lane_ld + i] = i < count ? from[i * depth + d] : 0.0f;
  }

  // (depth, lanes) at the distance `lane_ld`, for logits.
  const float* transposed(int64_t chunk) const {
    return transposed_.get() + chunk * depth * tiling_.lane_ld;
  }

  // (count, depth) at the distance `plain_ld`, for weights' gradients.
  const float* plain(int64_t chunk) const {
    return problem_.rows + chunk * tiling_.chunk * depth;
  }
  int64_t plain_ld() const { return depth; }
  int64_t plain_count(int64_t chunk) const { return tiling_.chunk_rows(problem_, chunk); }

 private:
  const Problem& problem_;
  const Tiling& tiling_;

 public:
  const int64_t depth;

 private:
  Buffer<float> transposed_;
};

}  // namespace dist_dml
