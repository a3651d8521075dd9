// Sixteen numbers at a time: loads, stores, rounding to bfloat16, exponentials, transposition.
//
// GCC's vector extensions become whatever the processor has (one AVX-512 register, two of AVX2,
// four of NEON); intrinsics stand only where the compiler does not find the one right instruction.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace dist_dml {

constexpr int64_t kLanes = 16;

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t IntLanes __attribute__((vector_size(64)));
typedef uint32_t BitLanes __attribute__((vector_size(64)));
typedef uint16_t HalfLanes __attribute__((vector_size(32)));

// A bfloat16, which is the upper half of a float32.
struct Half {
  uint16_t bits;
};

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

inline Lanes all_lanes(float x) { return x - Lanes{}; }

inline Lanes widened(HalfLanes halves) {
  return bits_as<Lanes>(__builtin_convertvector(halves, BitLanes) << 16);
}

inline Lanes load(const float* from) {
  Lanes x;
  __builtin_memcpy(&x, from, sizeof(x));
  return x;
}

inline Lanes load(const Half* from) {
  HalfLanes halves;
  __builtin_memcpy(&halves, from, sizeof(halves));
  return widened(halves);
}

inline void store(float* to, Lanes x) { __builtin_memcpy(to, &x, sizeof(x)); }

inline void store(Half* to, BitLanes upper_halves) {
  HalfLanes halves = __builtin_convertvector(upper_halves >> 16, HalfLanes);
  __builtin_memcpy(to, &halves, sizeof(halves));
}

// The first `count` < 16 lanes, zeros behind them: the end of a row of weights.
template <class T>
inline Lanes load_part(const T* from, int64_t count) {
  T part[kLanes] = {};
  std::memcpy(part, from, count * sizeof(T));
  return load(part);
}

template <class T, class X>
inline void store_part(T* to, X x, int64_t count) {
  T part[kLanes];
  store(part, x);
  std::memcpy(to, part, count * sizeof(T));
}

// `a > b ? a : b`: b where one of them is not a number.
inline Lanes larger(Lanes a, Lanes b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline Lanes smaller(Lanes a, Lanes b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

inline float sum(Lanes x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(x);
#else
  for (int step = 8; step >= 1; step /= 2)
    for (int i = 0; i < step; ++i) x[i] += x[i + step];
  return x[0];
#endif
}

// Whether a comparison holds in any lane.
inline bool any(IntLanes truth) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(bits_as<__m512i>(truth), bits_as<__m512i>(truth)) != 0;
#else
  int found = 0;
  for (int i = 0; i < kLanes; ++i) found |= truth[i];
  return found != 0;
#endif
}

inline Lanes square_root(Lanes x) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// Rounded to the nearest bfloat16, ties to even, in the upper halves; what is no number stays so.
inline BitLanes nearest_half(Lanes x) {
  BitLanes bits = bits_as<BitLanes>(x);
  BitLanes rounded = bits + 0x7fff + ((bits >> 16) & 1);
  BitLanes quiet = bits | 0x400000;
  return (x == x ? rounded : quiet) & 0xffff0000u;
}

// Two vectors, rounded to nearest, one behind the other.
inline void store_halves(Half* to, Lanes first, Lanes second) {
#if defined(__AVX512BF16__)
  __m512bh both = _mm512_cvtne2ps_pbh(second, first);
  __builtin_memcpy(to, &both, sizeof(both));
#else
  store(to, nearest_half(first));
  store(to + kLanes, nearest_half(second));
#endif
}

// Rounded to the nearest bfloat16, as float32.
inline Lanes rounded_to_half(Lanes x) {
#if defined(__AVX512BF16__)
  return widened(bits_as<HalfLanes>(_mm512_cvtneps_pbh(x)));
#else
  return bits_as<Lanes>(nearest_half(x));
#endif
}

// Two vectors, rounded to nearest, lane by lane: the layout of pairs that bfloat16 products read.
inline void store_pairs(Half* to, Lanes first, Lanes second) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
  alignas(64) static constexpr uint16_t kOrder[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  __m512i both = bits_as<__m512i>(_mm512_cvtne2ps_pbh(second, first));
  both = _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both);
  __builtin_memcpy(to, &both, sizeof(both));
#else
  BitLanes both = (nearest_half(first) >> 16) | nearest_half(second);
  __builtin_memcpy(to, &both, sizeof(both));
#endif
}

// exp(x) for x <= 0, within 3e-7 of itself down to x = -40, then 4e-7; 0 below -87.7 (nothing here
// is worth a subnormal number), so also for -inf; what is not a number stays so.
//
// x = n ln 2 + r with |r| <= ln 2 / 2. Adding `kShift` rounds x / ln 2 to the integer n and leaves
// n + 127 in the lowest bits, which moved up by 23 are 2^n; at the lower end n is -127 and 2^n
// becomes 0. e^r is the polynomial 1 + r (...) of degree 5 whose largest relative error is smallest
// (by Lawson's iteration: 9.2e-8). ln 2 as one float32 is wrong by 2e-9, hence e^x by 2e-9 n;
// that needs the product with n unrounded, in one fused operation, which -march=native gives.
inline Lanes exp_of_nonpositive(Lanes x) {
  constexpr float kShift = 12582912.0f + 127.0f;
  x = larger(all_lanes(-88.0f), x);
  Lanes shifted = x * 1.44269504f + kShift;
  Lanes r = x - (shifted - kShift) * 0.693147182f;
  Lanes e = all_lanes(0.00829030615f) * r + 0.0418979754f;
  e = e * r + 0.166676366f;
  e = e * r + 0.499991492f;
  e = e * r + 0.999999707f;
  e = e * r + 1.0f;
  return e * bits_as<Lanes>(bits_as<BitLanes>(shifted) << 23);
}

// The same for any x: from 88.4 on it is infinite.
inline Lanes exp_of(Lanes x) { return exp_of_nonpositive(smaller(all_lanes(88.8f), x)); }

// The 16 x 16 transpose of rows, in place: exchanges quarters of ever smaller squares.
template <int kStep>
inline void exchange(Lanes (&rows)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    if (i & kStep) continue;
    Lanes a = rows[i], b = rows[i + kStep];
#if defined(__clang__)
    for (int k = 0; k < kLanes; ++k) {
      rows[i][k] = (k & kStep) ? b[k - kStep] : a[k];
      rows[i + kStep][k] = (k & kStep) ? b[k] : a[k + kStep];
    }
#else
    IntLanes upper, lower;
    for (int k = 0; k < kLanes; ++k) {
      upper[k] = (k & kStep) ? kLanes + k - kStep : k;
      lower[k] = (k & kStep) ? kLanes + k : k + kStep;
    }
    rows[i] = __builtin_shuffle(a, b, upper);
    rows[i + kStep] = __builtin_shuffle(a, b, lower);
#endif
  }
}

inline void transpose(Lanes (&rows)[kLanes]) {
  exchange<8>(rows);
  exchange<4>(rows);
  exchange<2>(rows);
  exchange<1>(rows);
}

}  // namespace dist_dml
