// Matrix products of blocks that lie in the cache, and the rows in the layouts that they read.
//
// oneDNN's micro-kernels, by way of torch, which has them linked in: code made at run time for the
// processor and each size (AVX2, AVX-512, AMX), kept by each thread. bfloat16 products read their
// second operand in pairs, (K/2, N, 2), and add up in float32.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <cstring>
#include <type_traits>

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
// high x rest, rest x high, high x high; rest x rest is below what is kept. They are one product
// of three times the depth where `high` stands twice in both operands, side by side in the first
// and stacked in the second: sums then stay in registers, and 192 x 256 x 128 runs at 3.1 instead
// of 1.8 to 2.1 TFLOP/s (2 Xeon cores with AMX, 11/2026).
struct Split {};

// What a product of split operands loses, 2^-17 of an entry, is lost where gradients are large only:
// in a sum of many small entries it averages out. So logits that hold more than this share of their
// row's exponentials, and the labels', are computed and applied in float32; a row has at most 64 of
// them. The largest error of row and weight gradients is then that of float32 products
// (docs/LOG.md, 2026-11-21).
constexpr float kExactShare = 1.0f / 64;

struct SplitPointer {
  Half *high, *rest, *again;  // `again`, the second copy of `high`, or null.
  SplitPointer operator+(int64_t count) const {
    return {high + count, rest + count, again ? again + count : nullptr};
  }
};

// Planes of a first operand stand side by side in a row, K numbers apart.
inline SplitPointer left_planes(Half* at, int64_t k, bool twice) {
  return {at, at + k, twice ? at + 2 * k : nullptr};
}

// Planes of a second operand lie behind one another, K rows apart.
inline SplitPointer right_planes(Half* at, int64_t k, int64_t ld, bool twice) {
  return {at + k * ld, at, twice ? at + 2 * k * ld : nullptr};
}

// Without second copies it takes two products: a pass over C more, fewer numbers to store.
inline void multiply(int64_t m, int64_t n, int64_t k, SplitPointer a, int64_t ld_a,
                     SplitPointer b, int64_t ld_b, float* c, int64_t ld_c, bool add) {
  bool twice = a.again && b.again;
  multiply(m, n, twice ? 3 * k : 2 * k, a.high, ld_a, b.rest, ld_b, c, ld_c, add);
  if (!twice) multiply(m, n, k, a.high, ld_a, b.high, ld_b, c, ld_c, true);
}

// How operands of a kind are stored and pointed at, and how many numbers a value takes at most.
template <class Operand>
struct Storage {
  using Element = Operand;
  using Pointer = Operand*;
  static constexpr int64_t kPlanes = 1;
};

template <>
struct Storage<Split> {
  using Element = Half;
  using Pointer = SplitPointer;
  static constexpr int64_t kPlanes = 3;
};

template <class Operand>
using ElementOf = typename Storage<Operand>::Element;
template <class Operand>
using PointerTo = typename Storage<Operand>::Pointer;
template <class Operand>
constexpr int64_t kPlanes = Storage<Operand>::kPlanes;

template <class Operand>
inline PointerTo<Operand> as_left(ElementOf<Operand>* at, int64_t k, bool twice = true) {
  if constexpr (std::is_same_v<Operand, Split>) return left_planes(at, k, twice);
  else return at;
}

template <class Operand>
inline PointerTo<Operand> as_right(ElementOf<Operand>* at, int64_t k, int64_t ld,
                                   bool twice = true) {
  if constexpr (std::is_same_v<Operand, Split>) return right_planes(at, k, ld, twice);
  else return at;
}

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
  if (to.again) *to.again = *to.high;
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
        transposed_(kPlanes<Operand> * tiling.num_chunks * depth * tiling.lane_ld),
        plain_(with_plain ? kPlanes<Operand> * tiling.num_chunks * tiling.lanes *
                                tiling.feature_ld : 0) {}

  void pack(int64_t chunk) {
    int64_t lanes = tiling_.lanes, ld = tiling_.lane_ld, d_end = problem_.num_features;
    int64_t count = tiling_.chunk_rows(problem_, chunk);
    const float* from = problem_.rows + chunk * tiling_.chunk * d_end;
    auto across = transposed(chunk), along = plain(with_plain_ ? chunk : 0);
    for (int64_t i = 0; i < lanes; ++i)
      for (int64_t d = 0; d < depth; ++d) {
        float x = i < count && d < d_end ? from[i * d_end + d] : 0.0f;
        set(across + ((d / 2 * ld + i) * 2 + d % 2), x);
        if (with_plain_) set(along + ((i / 2 * plain_ld() + d) * 2 + i % 2), x);
      }
  }

  // Pairs of features (depth / 2, lanes, 2) at the distance of `lane_ld` pairs, for logits.
  PointerTo<Operand> transposed(int64_t chunk) const {
    int64_t at = chunk * depth * tiling_.lane_ld;
    return as_right<Operand>(transposed_.get() + kPlanes<Operand> * at, depth, tiling_.lane_ld);
  }

  // Pairs of rows (count / 2, depth, 2) at the distance of `plain_ld`, for weights' gradients.
  PointerTo<Operand> plain(int64_t chunk) const {
    int64_t at = chunk * tiling_.lanes * plain_ld();
    return as_right<Operand>(plain_.get() + kPlanes<Operand> * at, tiling_.lanes, plain_ld(),
                             false);
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
  Buffer<ElementOf<Operand>> transposed_, plain_;
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
