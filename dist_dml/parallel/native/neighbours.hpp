// Exact nearest neighbours: products of low precision choose candidates, float64 ranks them.
//
// A query q and a gallery item g are moved by the gallery's mean m and scaled: q' = (q - m) s and
// g' = (g - m) s. Then q'.g' + b(g) ranks the items like the inner product, with b = m s.g', and
// like the squared distance, with b = -|g'|^2 / 2. The product is computed of rounded operands; how
// far it may be from the true one is known: by what rounding took from each row (its norm, measured)
// and by what float32 sums lose (a bound). Let E be that for a query, and t the k-th largest computed
// score: the k items above t truly score t - E at least, so an item computed below t - 2 E is not
// among the k nearest. All others are candidates, and their values in float64 decide.
// A few items far from all others would widen E for every query: they are always candidates.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "exact_values.hpp"
#include "pool.hpp"
#include "products.hpp"

namespace dist_dml {

constexpr int64_t kItems = 256;        // Gallery items of a tile.
constexpr int64_t kBlockQueries = 128;  // Queries of a product.
constexpr float kLowest = -std::numeric_limits<float>::max();

// The order of the ctypes structure of `native_neighbours.py`.
struct Gallery {
  const float* rows;     // (g, D)
  const int64_t* ids;    // (g,): ties are in their order; an item of the query's id is no neighbour.
  const double* mean;    // (D,)
  int64_t num_items, num_features;
  int64_t squares;       // By squared distances, not by inner products.
  int64_t operand;       // Of products: 0 float32, 1 bfloat16.
  double scale;
  void* packed;          // (tiles, depth, 256) in the layout of second operands.
  float* bias;           // (tiles * 256,), -infinity behind the last item.
  double* norms;         // Largest |g'|, |what rounding took from g'|, |rounded g'| and |b|.
  const int64_t* far;    // Positions of items that are always candidates, in their order.
  int64_t num_far;
  int64_t num_threads;

  int64_t num_tiles() const { return (num_items + kItems - 1) / kItems; }
  int64_t depth() const { return rounded_up(num_features, 32); }
};

struct Queries {
  const float* rows;   // (q, D)
  const int64_t* ids;  // (q,) or null.
  int64_t num_queries;
  int64_t k;
  int64_t most_candidates;  // Rows with more are left to a pass of higher precision.
  int64_t job_queries;      // Rows that a thread takes at a time.
  int64_t* positions;       // (q, k), -1 where there is no neighbour.
  double* values;           // (q, k)
  int64_t* crowded;         // (q,), 1 for rows that were left.
};

inline double root_of_squares(double squares) { return std::sqrt(squares) * (1 + 1e-9); }

// A row moved and scaled, as operand; returns squares of its norm, of its rest, of the operand.
struct RowNorms {
  double whole = 0, rest = 0, operand = 0;
};

template <class Operand, class Put>
inline RowNorms moved_row(const float* row, const Gallery& gallery, Put put) {
  RowNorms norms;
  for (int64_t d = 0; d < gallery.num_features; ++d) {
    double x = (static_cast<double>(row[d]) - gallery.mean[d]) * gallery.scale, y;
    if constexpr (std::is_same_v<Operand, Half>) {
      Half half = half_of(static_cast<float>(x));
      put(d, half);
      y = widened(half);
    } else {
      float single = static_cast<float>(x);
      put(d, single);
      y = single;
    }
    norms.whole += x * x;
    norms.rest += (x - y) * (x - y);
    norms.operand += y * y;
  }
  return norms;
}

template <class Operand>
class GalleryPacking {
 public:
  explicit GalleryPacking(const Gallery& gallery) : gallery_(gallery) {}

  void run() {
    std::vector<double> most(4 * gallery_.num_threads, 0.0);
    Pool::of_process().run(static_cast<int>(gallery_.num_threads), [&](int thread) {
      WithSubnormals exact;
      for (int64_t tile = thread; tile < gallery_.num_tiles(); tile += gallery_.num_threads)
        pack(tile, most.data() + 4 * thread);
    });
    for (int64_t i = 0; i < 4; ++i) {
      gallery_.norms[i] = 0;
      for (int64_t thread = 0; thread < gallery_.num_threads; ++thread)
        gallery_.norms[i] = std::max(gallery_.norms[i], most[4 * thread + i]);
    }
  }

 private:
  static void raise(double& most, double x) { most = x > most || x != x ? x : most; }

  void pack(int64_t tile, double* most) const {
    int64_t depth = gallery_.depth(), features = gallery_.num_features;
    Operand* to = static_cast<Operand*>(gallery_.packed) + tile * depth * kItems;
    std::memset(to, 0, depth * kItems * sizeof(Operand));
    float* bias = gallery_.bias + tile * kItems;
    std::fill_n(bias, kItems, -std::numeric_limits<float>::infinity());
    int64_t count = std::min(kItems, gallery_.num_items - tile * kItems);
    for (int64_t j = 0; j < count; ++j) {
      if (std::binary_search(gallery_.far, gallery_.far + gallery_.num_far, tile * kItems + j))
        continue;
      const float* row = gallery_.rows + (tile * kItems + j) * features;
      RowNorms norms = moved_row<Operand>(row, gallery_, [&](int64_t d, Operand x) {
        if constexpr (std::is_same_v<Operand, Half>) to[(d / 2 * kItems + j) * 2 + d % 2] = x;
        else to[d * kItems + j] = x;
      });
      double b = -norms.whole / 2;
      if (!gallery_.squares) {
        b = 0;
        for (int64_t d = 0; d < features; ++d) {
          double x = (static_cast<double>(row[d]) - gallery_.mean[d]) * gallery_.scale;
          b += gallery_.mean[d] * gallery_.scale * x;
        }
      }
      bias[j] = static_cast<float>(b);
      raise(most[0], root_of_squares(norms.whole));
      raise(most[1], root_of_squares(norms.rest));
      raise(most[2], root_of_squares(norms.operand));
      raise(most[3], std::fabs(b));
    }
  }

  const Gallery& gallery_;
};

struct Ranked {
  double key;
  int64_t id, position;
  bool operator<(const Ranked& other) const {
    return key != other.key ? key < other.key : id < other.id;
  }
};

// Writes the k best of `found` for a query; `found` may hold the query's own item.
inline void write_best(const Gallery& gallery, const Queries& queries, int64_t row,
                       std::vector<Ranked>& found) {
  if (queries.ids)
    found.erase(std::remove_if(found.begin(), found.end(),
                               [&](const Ranked& one) { return one.id == queries.ids[row]; }),
                found.end());
  int64_t count = std::min<int64_t>(queries.k, found.size());
  std::partial_sort(found.begin(), found.begin() + count, found.end());
  for (int64_t i = 0; i < queries.k; ++i) {
    int64_t at = row * queries.k + i;
    queries.positions[at] = i < count ? found[i].position : -1;
    double far = std::numeric_limits<double>::infinity();
    double key = i < count ? found[i].key : far;
    queries.values[at] = gallery.squares ? key : -key;
  }
}

inline Ranked ranked(const Gallery& gallery, const float* query, int64_t position) {
  const float* item = gallery.rows + position * gallery.num_features;
  return {pair_key(query, item, gallery.num_features, gallery.squares), gallery.ids[position],
          position};
}

// One thread's search: `job_queries` rows at a time against all tiles.
template <class Operand>
class CandidateSearch {
 public:
  CandidateSearch(const Gallery& gallery, const Queries& queries)
      : gallery_(gallery),
        queries_(queries),
        depth_(gallery.depth()),
        searched_(std::min(queries.k + (queries.ids != nullptr), gallery.num_items)),
        mean_norm_(norm_of_mean(gallery)),
        operands_(queries.job_queries * depth_),
        products_(kBlockQueries * kItems),
        candidates_(queries.job_queries * queries.most_candidates),
        count_(queries.job_queries),
        threshold_(queries.job_queries),
        margin_(queries.job_queries) {}

  void search(int64_t first) {
    int64_t count = std::min(queries_.job_queries, queries_.num_queries - first);
    {
      WithSubnormals exact;
      for (int64_t i = 0; i < count; ++i) take(first + i, i);
    }
    {
      ReleaseProducts release(std::is_same_v<Operand, Half>);
      for (int64_t tile = 0; tile < gallery_.num_tiles(); ++tile)
        for (int64_t i = 0; i < count; i += kBlockQueries)
          scan(tile, i, std::min(kBlockQueries, count - i));
    }
    WithSubnormals exact;
    for (int64_t i = 0; i < count; ++i) finish(first + i, i);
  }

 private:
  struct Candidate {
    float score;
    int32_t position;
  };

  void take(int64_t row, int64_t i) {
    Operand* to = operands_.get() + i * depth_;
    std::memset(to, 0, depth_ * sizeof(Operand));
    RowNorms norms = moved_row<Operand>(queries_.rows + row * gallery_.num_features, gallery_,
                                        [&](int64_t d, Operand x) { to[d] = x; });
    double whole = root_of_squares(norms.rest) * gallery_.norms[0] +
                   root_of_squares(norms.operand) * gallery_.norms[1];
    // Sums of n float32 products in any order are off by n 2^-24 of the sum of their magnitudes at
    // most; 2^-22 leaves room for processors that cut instead of rounding, and for the sum with b.
    double product = root_of_squares(norms.operand) * gallery_.norms[2];
    double sums = std::ldexp((depth_ + 4) * product + 4 * gallery_.norms[3], -22);
    // The values themselves, and b, are sums in float64 with the mean in them.
    double query = root_of_squares(norms.whole), item = gallery_.norms[0];
    double sizes = gallery_.squares ? (query + item) * (query + item)
                                    : (query + mean_norm_) * (item + mean_norm_);
    double values = std::ldexp((depth_ + 16) * sizes, -51);
    // What float32 cannot hold counts as 0 in products: at most 2^-126 a term.
    double least = std::ldexp(static_cast<double>(depth_), -120);
    double margin = (whole + sums + values) * 1.001 + least;
    // Twice, and rounded up. What is not finite holds nothing back: the row will be crowded.
    margin_[i] = static_cast<float>(2 * margin * (1 + 1e-6));
    bool usable = std::isfinite(margin_[i]) && product < 1e30 && gallery_.norms[3] < 1e30;
    count_[i] = usable ? 0 : -1;
    threshold_[i] = usable ? kLowest : std::numeric_limits<float>::infinity();
  }

  void scan(int64_t tile, int64_t first, int64_t count) {
    const Operand* items = static_cast<const Operand*>(gallery_.packed) + tile * depth_ * kItems;
    float* products = products_.get();
    multiply(count, kItems, depth_, operands_.get() + first * depth_, depth_, items, kItems,
             products, kItems, false);
    const float* bias = gallery_.bias + tile * kItems;
    for (int64_t i = 0; i < count; ++i) {
      const float* row = products + i * kItems;
      for (int64_t j = 0; j < kItems; j += 4 * kLanes) {
        Lanes low = all_lanes(threshold_[first + i]);
        Lanes a = load(row + j) + load(bias + j);
        Lanes b = load(row + j + kLanes) + load(bias + j + kLanes);
        Lanes c = load(row + j + 2 * kLanes) + load(bias + j + 2 * kLanes);
        Lanes e = load(row + j + 3 * kLanes) + load(bias + j + 3 * kLanes);
        if (!any((larger(larger(a, b), larger(c, e))) >= low)) continue;
        int64_t position = tile * kItems + j;
        keep(first + i, a, position);
        keep(first + i, b, position + kLanes);
        keep(first + i, c, position + 2 * kLanes);
        keep(first + i, e, position + 3 * kLanes);
      }
    }
  }

  void keep(int64_t i, Lanes scores, int64_t position) {
    if (!any(scores >= all_lanes(threshold_[i]))) return;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      // The threshold may rise on the way, and the row be given up.
      if (!(scores[lane] >= threshold_[i]) || count_[i] < 0) continue;
      Candidate* row = candidates_.get() + i * queries_.most_candidates;
      row[count_[i]++] = {scores[lane], static_cast<int32_t>(position + lane)};
      if (count_[i] == queries_.most_candidates) tighten(i);
    }
  }

  // Drops what is certainly not among the nearest. A row that stays nearly full is given up: it
  // would be tightened again and again.
  void tighten(int64_t i) {
    Candidate* row = candidates_.get() + i * queries_.most_candidates;
    if (count_[i] >= searched_) {
      scores_.resize(count_[i]);
      for (int64_t c = 0; c < count_[i]; ++c) scores_[c] = row[c].score;
      auto kth = scores_.begin() + (searched_ - 1);
      std::nth_element(scores_.begin(), kth, scores_.end(), std::greater<float>());
      // The difference is rounded up by a step if need be: down, to be safe.
      float low = std::nextafterf(*kth - margin_[i], kLowest);
      threshold_[i] = std::max(threshold_[i], low);
      auto end = std::remove_if(row, row + count_[i],
                                [&](const Candidate& one) { return one.score < threshold_[i]; });
      count_[i] = end - row;
    }
    if (count_[i] > queries_.most_candidates - queries_.most_candidates / 8) {
      count_[i] = -1;
      threshold_[i] = std::numeric_limits<float>::infinity();
    }
  }

  void finish(int64_t row, int64_t i) {
    if (count_[i] > 0) tighten(i);
    queries_.crowded[row] = count_[i] < 0;
    if (count_[i] < 0) return;
    const Candidate* found = candidates_.get() + i * queries_.most_candidates;
    const float* query = queries_.rows + row * gallery_.num_features;
    best_.clear();
    for (int64_t c = 0; c < count_[i]; ++c) {
      if (c + 4 < count_[i])  // Items lie anywhere in memory: their first lines are fetched ahead.
        __builtin_prefetch(gallery_.rows +
                           int64_t{found[c + 4].position} * gallery_.num_features);
      best_.push_back(ranked(gallery_, query, found[c].position));
    }
    for (int64_t c = 0; c < gallery_.num_far; ++c)
      best_.push_back(ranked(gallery_, query, gallery_.far[c]));
    write_best(gallery_, queries_, row, best_);
  }

  static double norm_of_mean(const Gallery& gallery) {
    double squares = 0;
    for (int64_t d = 0; d < gallery.num_features; ++d) {
      double x = gallery.mean[d] * gallery.scale;
      squares += x * x;
    }
    return root_of_squares(squares);
  }

  const Gallery& gallery_;
  const Queries& queries_;
  int64_t depth_, searched_;
  double mean_norm_;
  Buffer<Operand> operands_;
  Buffer<float> products_;
  Buffer<Candidate> candidates_;
  std::vector<int64_t> count_;
  std::vector<float> threshold_, margin_, scores_;
  std::vector<Ranked> best_;
};

// Jobs go to whichever thread is free: a query's answer does not depend on it.
template <class Operand>
inline void search_candidates(const Gallery& gallery, const Queries& queries) {
  std::atomic<int64_t> next{0};
  Pool::of_process().run(static_cast<int>(gallery.num_threads), [&](int) {
    CandidateSearch<Operand> search(gallery, queries);
    for (int64_t first = next.fetch_add(queries.job_queries); first < queries.num_queries;
         first = next.fetch_add(queries.job_queries))
      search.search(first);
  });
}

// The nearest so far of a query that is compared with every item.
class NearestSoFar {
 public:
  explicit NearestSoFar(int64_t kept) : kept_(kept), most_(std::max<int64_t>(4 * kept, 1024)) {}

  void add(const Ranked& one) {
    if (is_full_ && !(one < last_)) return;
    best_.push_back(one);
    if (static_cast<int64_t>(best_.size()) < most_) return;
    std::nth_element(best_.begin(), best_.begin() + (kept_ - 1), best_.end());
    best_.resize(kept_);
    last_ = best_.back();
    is_full_ = true;
  }

  std::vector<Ranked>& found() { return best_; }

 private:
  int64_t kept_, most_;
  bool is_full_ = false;
  Ranked last_{};
  std::vector<Ranked> best_;
};

// Every value in float64, for the queries whose `crowded` is 1, which becomes 0. Some queries go
// over the gallery together: a tile of items stays in the cache for them.
inline void search_all(const Gallery& gallery, const Queries& queries) {
  constexpr int64_t kTogether = 32, kTile = 64;
  std::atomic<int64_t> next{0};
  Pool::of_process().run(static_cast<int>(gallery.num_threads), [&](int) {
    WithSubnormals exact;
    int64_t kept = std::min<int64_t>(queries.k + 1, gallery.num_items);
    for (int64_t first = next.fetch_add(kTogether); first < queries.num_queries;
         first = next.fetch_add(kTogether)) {
      std::vector<int64_t> rows;
      for (int64_t row = first; row < std::min(first + kTogether, queries.num_queries); ++row)
        if (queries.crowded[row]) rows.push_back(row);
      std::vector<NearestSoFar> nearest(rows.size(), NearestSoFar(kept));
      for (int64_t tile = 0; tile < gallery.num_items; tile += kTile)
        for (size_t i = 0; i < rows.size(); ++i) {
          const float* query = queries.rows + rows[i] * gallery.num_features;
          for (int64_t j = tile; j < std::min(tile + kTile, gallery.num_items); ++j)
            nearest[i].add(ranked(gallery, query, j));
        }
      for (size_t i = 0; i < rows.size(); ++i) {
        write_best(gallery, queries, rows[i], nearest[i].found());
        queries.crowded[rows[i]] = 0;
      }
    }
  });
}

}  // namespace dist_dml
