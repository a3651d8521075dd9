// What the two sweeps are told, in the order of the ctypes structures of `sweep_native.py`; the
// choice of tiles; buffers. All integers have 64 bits: 10^8 classes x 128 do not fit into 32.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "lanes.hpp"

namespace dist_dml {

struct Problem {
  const float* rows;  // (R, D)
  int64_t num_rows, num_features;
  const int64_t* columns;  // (R,), -1 where a label is not among the classes that take part.
  void* weight;            // (c, D)
  const float* bias;       // (n,) or null.
  const int64_t* active;   // (n,) or null.
  int64_t num_classes;     // n
  double scale;            // 0 for inner products.
  double filter_below;
  int64_t weight_is_half;
  int64_t operand;  // Of products: 0 float32, 1 bfloat16, 2 float32 as two bfloat16.
  int64_t tile_classes, row_chunk, num_threads, cache_bytes;  // 0: tile and chunk are chosen.

  int64_t weight_row(int64_t position) const { return active ? active[position] : position; }
};

struct ForwardResult {
  float *label, *rival, *mass, *gap;  // (R,)
  float* pull;                        // (R, D) or null.
  float* kept;                        // (chunks, n + 1, distance of rows) or null.
  int64_t with_gap;
};

struct Update {
  int64_t kind;  // 0 sgd, 1 adam, 2 adamw, 3 adagrad.
  double learning_rate, weight_decay, momentum, beta, beta_square, epsilon, clip_norm;
  int64_t nesterov, step, rounding;  // 0 nearest, 1 stochastic, 2 kahan.
  int64_t seed, first_class;
  void* moment;        // momentum_buffer or exp_avg.
  float* square;       // exp_avg_sq (c, D), or adagrad's sum (c,).
  Half* compensation;  // (c, D)
  int64_t moment_is_half;
};

struct BackwardTask {
  const float *normaliser, *factor, *offset, *label;  // (R,)
  const float* kept;
  float* bias_gradient;  // (n,) or null.
  float* gradient;       // (c, D) or null.
  int64_t accumulate;
  const Update* update;  // or null.
  int64_t* filtered_classes;
  double* filtered_mass;
};

inline int64_t rounded_up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// Uninitialised numbers at the start of a cache line.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    size_t bytes = rounded_up(std::max<int64_t>(count, 1) * sizeof(T), 64);
    data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
    if (!data_) throw std::bad_alloc();
  }
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
};

// How the product of classes and rows is cut. A tile's weights, logits and gradients should stay in
// a core's L2 cache from the first product to the update.
struct Tiling {
  int64_t tile, num_tiles;    // Classes of a tile, an even number.
  int64_t chunk, num_chunks;  // Rows of a chunk.
  int64_t lanes;              // `chunk`, rounded up so that vectors and AMX tiles are full.
  int64_t features;           // D, rounded up likewise.
  int64_t lane_ld, feature_ld;  // Distances of rows of so many numbers.
  int64_t block;  // Chunks whose pull is summed up in one pass over the classes of a thread.

  explicit Tiling(const Problem& problem) {
    constexpr int64_t kRound = 32;  // The depth of a bfloat16 AMX tile; two vectors.
    int64_t depth = problem.num_features, n = problem.num_classes;
    // A quarter of the cache for the pull, and one for the rows, of one pass. With fewer rows in a
    // pass the weights would be read more often; with more, the pull would leave the cache.
    int64_t fitting = problem.cache_bytes / 4 / (4 * depth) / kRound * kRound;
    fitting = std::max<int64_t>(fitting, 64);
    int64_t operand = problem.operand == 1 ? 2 : 4;
    // float32 products of 256 x 512 read their second operand from further away than of 128 x 512.
    int64_t whole = problem.operand != 0 ? fitting : std::max<int64_t>(fitting / 2, 64);
    chunk = problem.row_chunk ? problem.row_chunk : std::min<int64_t>(whole, 256);
    chunk = std::min(chunk, std::max<int64_t>(problem.num_rows, 1));
    num_chunks = (problem.num_rows + chunk - 1) / chunk;
    block = std::max<int64_t>(fitting / chunk, 1);
    lanes = rounded_up(chunk, kRound);
    features = rounded_up(depth, kRound);
    lane_ld = apart(lanes);
    feature_ld = apart(features);
    // Another quarter for a tile's weights in both layouts, or gradient, state and logits.
    int64_t per_class = (4 + 2 * operand) * depth + 4 * lanes;
    tile = std::clamp<int64_t>(problem.cache_bytes / 4 / per_class / kRound * kRound, 64, 512);
    if (problem.tile_classes) tile = rounded_up(problem.tile_classes, 2);
    // Small problems: a tile for every thread at least.
    int64_t share = (n + problem.num_threads - 1) / problem.num_threads;
    tile = std::min(tile, rounded_up(std::max<int64_t>(share, 1), kRound));
    num_tiles = (n + tile - 1) / tile;
  }

  // Rows at distances of 512 bytes and their multiples meet in few sets of the L1 cache: bfloat16
  // products of 192 x 256 x 128 ran at 1.2 instead of 2.1 TFLOP/s a core (Xeon with AMX, 11/2026).
  static int64_t apart(int64_t count) { return count % 128 == 0 ? count + kLanes : count; }

  int64_t chunk_rows(const Problem& problem, int64_t index) const {
    return std::min(chunk, problem.num_rows - index * chunk);
  }
};

// The labels of a chunk's rows by class, so that a tile finds its own.
struct LabelEntry {
  int64_t column, row;  // The row within its chunk.
};

class Labels {
 public:
  Labels(const Problem& problem, const Tiling& tiling) : by_chunk_(tiling.num_chunks) {
    for (int64_t i = 0; i < problem.num_rows; ++i)
      if (problem.columns[i] >= 0)
        by_chunk_[i / tiling.chunk].push_back({problem.columns[i], i % tiling.chunk});
    for (auto& entries : by_chunk_)
      std::sort(entries.begin(), entries.end(), [](const LabelEntry& a, const LabelEntry& b) {
        return a.column != b.column ? a.column < b.column : a.row < b.row;
      });
  }

  struct Range {
    const LabelEntry *first, *last;
    const LabelEntry* begin() const { return first; }
    const LabelEntry* end() const { return last; }
    bool empty() const { return first == last; }
  };

  Range of_tile(int64_t chunk, int64_t first, int64_t count) const {
    const auto& entries = by_chunk_[chunk];
    auto before = [](const LabelEntry& entry, int64_t column) { return entry.column < column; };
    auto from = std::lower_bound(entries.begin(), entries.end(), first, before);
    auto to = std::lower_bound(from, entries.end(), first + count, before);
    return {entries.data() + (from - entries.begin()), entries.data() + (to - entries.begin())};
  }

 private:
  std::vector<std::vector<LabelEntry>> by_chunk_;
};

}  // namespace dist_dml
