// One tile of class weights as operands of products: gathered, rounded, transposed, with norms.
#pragma once

#include <cmath>
#include <type_traits>

#include "products.hpp"

namespace dist_dml {

constexpr float kSmallestNorm = 1e-12f;  // SMALLEST_NORM of class_sweeps.py.

template <class Weight>
inline Weight* weight_at(const Problem& problem, int64_t position) {
  return static_cast<Weight*>(problem.weight) +
         problem.weight_row(position) * problem.num_features;
}

// Asks for `count` numbers that will be needed soon. Not `__builtin_prefetch`: GCC 12 finds that
// functions which only prefetch have no effect, and leaves their calls out.
template <class T>
inline void prefetch(const T* from, int64_t count) {
#if defined(__x86_64__)
  for (int64_t i = 0; i < count; i += 64 / sizeof(T))
    asm volatile("prefetcht1 %0" : : "m"(from[i]));
#endif
}

template <class Weight, class Operand>
class WeightTile {
 public:
  static constexpr bool kSame = std::is_same_v<Weight, Operand>;

  WeightTile(const Problem& problem, const Tiling& tiling, bool with_transpose)
      : problem_(problem),
        depth_(std::is_same_v<Operand, float> ? problem.num_features : tiling.features),
        in_place_(kSame && !problem.active && depth_ == problem.num_features),
        // The distance of its rows should be no power of 2, which would put them all into few sets.
        transposed_ld_(kPlanes<Operand> * rounded_up(tiling.tile, 2 * kLanes) + 2 * kLanes),
        copy_(in_place_ ? 0 : tiling.tile * operand_ld()),
        transposed_(with_transpose ? problem.num_features * transposed_ld_ : 0),
        factor_(transposed_ld_),
        square_(transposed_ld_),
        bias_(transposed_ld_) {}

  // The tile of `count` classes from position `first` on. Norms are of the unrounded weights.
  void take(int64_t first, int64_t count) {
    first_ = first;
    count_ = count;
    operand_ = as_left<Operand>(copy_.get(), depth_);
    if constexpr (kSame)
      if (in_place_) operand_ = weight_at<Weight>(problem_, first);
    for (int64_t j = 0; j < count; ++j) {
      float square = in_place_ ? square_of_row(j) : copy_row(j);
      // The reference divides by max(|w|, 1e-12); infinite and undefined norms stay what they are.
      square_.get()[j] = square < kSmallestNorm * kSmallestNorm
                             ? kSmallestNorm * kSmallestNorm : square;
      factor_.get()[j] = problem_.scale != 0
          ? static_cast<float>(problem_.scale) / std::sqrt(square_.get()[j]) : 1.0f;
      bias_.get()[j] = problem_.bias ? problem_.bias[first + j] : 0.0f;
    }
    for (int64_t j = count; j < count + count % 2; ++j) {
      factor_.get()[j] = 1.0f;
      bias_.get()[j] = 0.0f;
    }
  }

  // Makes (D, padded count) of the operand; classes that are not there are zeros.
  void transpose_operand() {
    if constexpr (std::is_same_v<Operand, Split>) {
      transpose_plane(operand_.high, transposed().high, transposed().again);
      transpose_plane(operand_.rest, transposed().rest);
    } else {
      transpose_plane(operand_, transposed());
    }
  }

  // w_j . x in float32.
  float exact_product(int64_t j, const float* x) const {
    const Weight* w = row(j);
    Lanes products = Lanes{};
    int64_t depth = problem_.num_features, d = 0;
    for (; d + kLanes <= depth; d += kLanes) products += load(w + d) * load(x + d);
    if (d < depth) products += load_part(w + d, depth - d) * load_part(x + d, depth - d);
    return sum(products);
  }

  Weight* row(int64_t j) const { return weight_at<Weight>(problem_, first_ + j); }
  int64_t first() const { return first_; }
  int64_t count() const { return count_; }
  // `count`, filled up for products that sum over classes.
  int64_t padded_count() const {
    return std::is_same_v<Operand, float> ? count_ : rounded_up(count_, 2 * kLanes);
  }
  int64_t depth() const { return depth_; }
  PointerTo<Operand> operand() const { return operand_; }
  int64_t operand_ld() const { return kPlanes<Operand> * depth_; }
  PointerTo<Operand> transposed() const {
    return as_left<Operand>(transposed_.get(), padded_count());
  }
  int64_t transposed_ld() const { return transposed_ld_; }
  const float* factor() const { return factor_.get(); }  // f, 1 for inner products.
  const float* square() const { return square_.get(); }  // |w|^2, at least the smallest norm's.
  const float* bias() const { return bias_.get(); }

 private:
  template <class Element>
  void transpose_plane(const Element* from, Element* to, Element* again = nullptr) const {
    int64_t depth = problem_.num_features;
    for (int64_t j = 0; j < padded_count(); j += kLanes)
      for (int64_t d = 0; d < depth; d += kLanes) {
        Lanes block[kLanes];
        int64_t part = std::min(kLanes, depth_ - d);
        for (int64_t i = 0; i < kLanes; ++i) {
          if (j + i >= count_) block[i] = Lanes{};
          else if (part == kLanes) block[i] = load(from + (j + i) * operand_ld() + d);
          else block[i] = load_part(from + (j + i) * operand_ld() + d, part);
        }
        transpose(block);
        for (int64_t i = 0; i < std::min(kLanes, depth - d); ++i) {
          int64_t at = (d + i) * transposed_ld_ + j;
          if constexpr (std::is_same_v<Element, float>) store(to + at, block[i]);
          else store(to + at, bits_as<BitLanes>(block[i]));
          if (again) std::memcpy(again + at, to + at, kLanes * sizeof(Element));
        }
      }
  }

  float square_of_row(int64_t j) const {
    if (problem_.scale == 0) return 1.0f;
    const Weight* from = row(j);
    Lanes squares = Lanes{};
    int64_t depth = problem_.num_features, d = 0;
    for (; d + kLanes <= depth; d += kLanes) {
      Lanes x = load(from + d);
      squares += x * x;
    }
    if (d < depth) {
      Lanes x = load_part(from + d, depth - d);
      squares += x * x;
    }
    return sum(squares);
  }

  float copy_row(int64_t j) const {
    const Weight* from = row(j);
    PointerTo<Operand> to = as_left<Operand>(copy_.get() + j * operand_ld(), depth_);
    Lanes squares = Lanes{};
    int64_t depth = problem_.num_features, d = 0;
    if constexpr (std::is_same_v<Operand, Split>)
      for (; d + 2 * kLanes <= depth; d += 2 * kLanes) {
        Lanes x = load(from + d), y = load(from + d + kLanes);
        squares += x * x + y * y;
        store_halves(to.high + d, x, y);
        store_halves(to.again + d, x, y);
        store_halves(to.rest + d, x - rounded_to_half(x), y - rounded_to_half(y));
      }
    if constexpr (!kSame && std::is_same_v<Operand, Half>)
      for (; d + 2 * kLanes <= depth; d += 2 * kLanes) {
        Lanes x = load(from + d), y = load(from + d + kLanes);
        squares += x * x + y * y;
        store_halves(to + d, x, y);
      }
    for (; d < depth_; d += kLanes) {
      int64_t part = std::clamp<int64_t>(depth - d, 0, kLanes);
      Lanes x = part == kLanes ? load(from + d) : load_part(from + d, part);
      squares += x * x;
      int64_t room = std::min(kLanes, depth_ - d);
      if constexpr (std::is_same_v<Operand, float>) {
        if (room == kLanes) store(to + d, x);
        else store_part(to + d, x, room);
      } else if constexpr (std::is_same_v<Operand, Split>) {
        store_part(to.high + d, nearest_half(x), room);
        store_part(to.again + d, nearest_half(x), room);
        store_part(to.rest + d, nearest_half(x - rounded_to_half(x)), room);
      } else {
        if (room == kLanes) store(to + d, nearest_half(x));
        else store_part(to + d, nearest_half(x), room);
      }
    }
    return sum(squares);
  }

  const Problem& problem_;
  int64_t depth_;
  bool in_place_;
  int64_t transposed_ld_;
  Buffer<ElementOf<Operand>> copy_, transposed_;
  Buffer<float> factor_, square_, bias_;
  int64_t first_ = 0, count_ = 0;
  PointerTo<Operand> operand_{};
};

}  // namespace dist_dml
