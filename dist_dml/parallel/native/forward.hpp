// The forward sweep: labels' logits, largest other logit, sums of exponentials, and the pull.
//
// Logits stand transposed, one class a row, so that sums over classes run down the lanes. Each
// thread sums over its own tiles; the threads' sums are merged in their order.
#pragma once

#include <limits>

#include "pool.hpp"
#include "weights.hpp"

namespace dist_dml {

constexpr float kNoRival = -std::numeric_limits<float>::max() / 4;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// largest = max(largest, f s + b) over an even number of classes, `ld` numbers apart.
inline void raise_largest(const float* logits, int64_t count, int64_t lanes, int64_t ld,
                          const float* factor, const float* bias, float* largest) {
  for (int64_t j = 0; j < count; j += 2) {
    const float *first = logits + j * ld, *second = first + ld;
    Lanes f0 = all_lanes(factor[j]), b0 = all_lanes(bias[j]);
    Lanes f1 = all_lanes(factor[j + 1]), b1 = all_lanes(bias[j + 1]);
    for (int64_t i = 0; i < lanes; i += kLanes) {
      Lanes most = larger(f0 * load(first + i) + b0, load(largest + i));
      store(largest + i, larger(f1 * load(second + i) + b1, most));
    }
  }
}

// The exponentials p = exp(f s + b - largest) of an even number of classes: mass += p, gap +=
// largest - (f s + b), except for logits of -inf, which are the labels'. With `Out` the products
// p f are stored: as they are, one class a row, or as pairs of classes. `out` may be `logits`:
// stores stay behind loads. `ahead(j)` is called once a class.
template <bool kGap, class Out, class Ahead>
inline void exponentials(const float* logits, int64_t count, int64_t lanes, int64_t ld,
                         const float* factor, const float* bias, const float* largest, float* mass,
                         float* gap, Out out, Ahead ahead) {
  for (int64_t j = 0; j < count; j += 2) {
    ahead(j);
    ahead(j + 1);
    const float *first = logits + j * ld, *second = first + ld;
    Lanes f0 = all_lanes(factor[j]), b0 = all_lanes(bias[j]);
    Lanes f1 = all_lanes(factor[j + 1]), b1 = all_lanes(bias[j + 1]);
    for (int64_t i = 0; i < lanes; i += kLanes) {
      Lanes most = load(largest + i);
      Lanes x0 = f0 * load(first + i) + b0 - most, x1 = f1 * load(second + i) + b1 - most;
      Lanes p0 = exp_of_nonpositive(x0), p1 = exp_of_nonpositive(x1);
      store(mass + i, load(mass + i) + (p0 + p1));
      if constexpr (kGap) {
        x0 = x0 == kMinusInfinity ? Lanes{} : x0;
        x1 = x1 == kMinusInfinity ? Lanes{} : x1;
        store(gap + i, load(gap + i) - (x0 + x1));
      }
      if constexpr (std::is_same_v<Out, float*>) {
        store(out + j * ld + i, p0 * f0);
        store(out + (j + 1) * ld + i, p1 * f1);
      } else if constexpr (std::is_same_v<Out, SplitPointer>) {
        Lanes x = p0 * f0, y = p1 * f1;
        store_pairs(out.high + j * ld + 2 * i, x, y);
        store_pairs(out.again + j * ld + 2 * i, x, y);
        store_pairs(out.rest + j * ld + 2 * i, x - rounded_to_half(x), y - rounded_to_half(y));
      } else if constexpr (std::is_same_v<Out, Half*>) {
        store_pairs(out + j * ld + 2 * i, p0 * f0, p1 * f1);
      }
    }
  }
}

template <class Weight, class Operand>
class ForwardThread {
  static constexpr bool kSplit = std::is_same_v<Operand, Split>;

 public:
  ForwardThread(const Problem& problem, const Tiling& tiling, const PackedRows<Operand>& rows,
                const Labels& labels, const ForwardResult& result)
      : problem_(problem),
        tiling_(tiling),
        rows_(rows),
        labels_(labels),
        result_(result),
        weights_(problem, tiling, result.pull != nullptr),
        products_((rounded_up(tiling.tile, 2 * kLanes) + 2) * tiling.lane_ld),
        planes_(std::is_same_v<Operand, Split> && result.pull
                    ? 3 * rounded_up(tiling.tile, 2 * kLanes) * tiling.lane_ld : 0),
        largest_(tiling.block * tiling.lanes),
        tile_largest_(tiling.lanes),
        tile_mass_(tiling.lanes),
        tile_gap_(tiling.lanes),
        total_(tiling.lanes),
        pull_(result.pull ? tiling.block * problem.num_features * tiling.lanes : 0) {}

  // Sums the tiles `from` to `to` of `num_chunks` chunks from `first_chunk` on.
  void sweep(int64_t from, int64_t to, int64_t first_chunk, int64_t num_chunks) {
    ReleaseProducts release(!std::is_same_v<Operand, float>);
    int64_t count = num_chunks * tiling_.lanes;
    std::fill_n(largest_.get(), count, kNoRival);
    mass_.assign(count, 0.0);
    gap_.assign(count, 0.0);
    others_.assign(count, 0.0);
    if (result_.pull) std::fill_n(pull_.get(), count * problem_.num_features, 0.0f);
    for (int64_t tile = from; tile < to; ++tile) {
      int64_t first = tile * tiling_.tile;
      weights_.take(first, std::min(tiling_.tile, problem_.num_classes - first));
      if (result_.pull) weights_.transpose_operand();
      // Early tiles are held against a part of the final sum only: a lenient share saves work there.
      share_ = kExactShare * std::min<float>(4.0f, static_cast<float>(to - from) / (tile + 1 - from));
      next_ = tile + 1 < to ? first + tiling_.tile : problem_.num_classes;
      for (int64_t k = 0; k < num_chunks; ++k) add_chunk(first_chunk + k, k);
    }
  }

  // What `merge` reads: of lane `i` of the block.
  float largest(int64_t i) const { return largest_.get()[i]; }
  double mass(int64_t i) const { return mass_[i]; }
  double gap(int64_t i) const { return gap_[i]; }
  double others(int64_t i) const { return others_[i]; }
  const float* pull(int64_t k) const {
    return pull_.get() + k * problem_.num_features * tiling_.lanes;
  }

 private:
  void add_chunk(int64_t chunk, int64_t k) {
    int64_t lanes = tiling_.lanes, count = weights_.count(), even = count + count % 2;
    int64_t ld = tiling_.lane_ld, first = weights_.first();
    float* logits = products_.get();
    if (result_.kept)  // A chunk's logits of all classes lie together.
      logits = result_.kept + (chunk * (problem_.num_classes + 1) + first) * ld;
    multiply(count, lanes, weights_.depth(), weights_.operand(), weights_.operand_ld(),
             rows_.transposed(chunk), ld, logits, ld, false);
    if (even > count) std::fill_n(logits + count * ld, lanes, kMinusInfinity);
    auto own = labels_.of_tile(chunk, first, count);
    saved_.clear();
    for (const LabelEntry& entry : own) {
      int64_t j = entry.column - first;
      float& logit = logits[j * ld + entry.row];
      if constexpr (kSplit) logit = weights_.exact_product(j, row_at(chunk, entry.row));
      saved_.push_back(logit);
      result_.label[chunk * tiling_.chunk + entry.row] =
          weights_.factor()[j] * logit + weights_.bias()[j];
      logit = kMinusInfinity;
    }
    raise(logits, even, k);
    add_exponentials(logits, even, k);
    if constexpr (kSplit) make_large_exact(logits, chunk, k);
    for (int64_t i = 0; i < lanes; ++i) others_[k * lanes + i] += count;
    size_t index = 0;
    for (const LabelEntry& entry : own) {
      others_[k * lanes + entry.row] -= 1;
      if (result_.kept) logits[(entry.column - first) * ld + entry.row] = saved_[index++];
    }
    if (result_.pull) add_pull(k);
  }

  // Raises the running maximum, and what was summed up relative to the old one.
  void raise(const float* logits, int64_t even, int64_t k) {
    int64_t lanes = tiling_.lanes;
    float *largest = largest_.get() + k * lanes, *of_tile = tile_largest_.get();
    std::fill_n(of_tile, lanes, kNoRival);
    raise_largest(logits, even, lanes, tiling_.lane_ld, weights_.factor(), weights_.bias(),
                  of_tile);
    for (int64_t i = 0; i < lanes; i += kLanes) {
      Lanes then = load(largest + i), now = larger(load(of_tile + i), then);
      if (!any(now > then)) continue;
      store(largest + i, now);
      Lanes shrink = exp_of_nonpositive(then - now);
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        int64_t row = k * lanes + i + lane;
        mass_[row] *= shrink[lane];
        gap_[row] += others_[row] * (static_cast<double>(now[lane]) - then[lane]);
      }
      if (!result_.pull) continue;
      float* pull = pull_.get() + k * problem_.num_features * lanes + i;
      for (int64_t d = 0; d < problem_.num_features; ++d)
        store(pull + d * lanes, load(pull + d * lanes) * shrink);
    }
  }

  void add_exponentials(const float* logits, int64_t even, int64_t k) {
    int64_t lanes = tiling_.lanes;
    std::fill_n(tile_mass_.get(), lanes, 0.0f);
    std::fill_n(tile_gap_.get(), lanes, 0.0f);
    // While one tile computes, the next one's weights come from memory.
    int64_t left = k == 0 ? problem_.num_classes - next_ : 0;
    auto ahead = [&](int64_t j) {
      if (j < left) prefetch(weight_at<Weight>(problem_, next_ + j), problem_.num_features);
    };
    auto run = [&](auto with_gap, auto out) {
      exponentials<decltype(with_gap)::value>(
          logits, even, lanes, tiling_.lane_ld, weights_.factor(), weights_.bias(),
          largest_.get() + k * lanes, tile_mass_.get(), tile_gap_.get(), out, ahead);
    };
    auto with_out = [&](auto out) {
      if (result_.with_gap) run(std::true_type{}, out);
      else run(std::false_type{}, out);
    };
    if (result_.pull) with_out(products());
    else with_out(nullptr);
    for (int64_t i = 0; i < lanes; ++i) {  // float32 within a tile, float64 over tiles.
      mass_[k * lanes + i] += tile_mass_.get()[i];
      total_.get()[i] = static_cast<float>(mass_[k * lanes + i]);
      gap_[k * lanes + i] += tile_gap_.get()[i];
    }
  }

  // Finds the logits of a tile that hold more than `share_` of what their row has summed up so far,
  // and computes them and what they add in float32.
  void make_large_exact(float* logits, int64_t chunk, int64_t k) {
    int64_t ld = tiling_.lane_ld, present = tiling_.chunk_rows(problem_, chunk);
    for (int64_t i = 0; i < present; i += kLanes) {
      Lanes least = all_lanes(std::numeric_limits<float>::infinity());
      Lanes most = load(largest_.get() + k * tiling_.lanes + i);
      Lanes enough = share_ * load(total_.get() + i);
      IntLanes found = exp_of_nonpositive(load(tile_largest_.get() + i) - most) > enough;
      if (!any(found)) continue;
      for (int64_t lane = 0; lane < std::min(kLanes, present - i); ++lane)
        if (found[lane]) least[lane] = most[lane] + std::log(enough[lane]);
      for (int64_t j = 0; j < weights_.count(); ++j) {
        Lanes f = all_lanes(weights_.factor()[j]), b = all_lanes(weights_.bias()[j]);
        IntLanes large = f * load(logits + j * ld + i) + b > least;
        if (!any(large)) continue;
        for (int64_t lane = 0; lane < kLanes; ++lane)
          if (large[lane]) make_exact(logits, j, chunk, i + lane, k);
      }
    }
  }

  // Moves class j of the tile from the products to the sums of lane `i`.
  void make_exact(float* logits, int64_t j, int64_t chunk, int64_t i, int64_t k) {
    int64_t lane = k * tiling_.lanes + i, depth = problem_.num_features;
    float f = weights_.factor()[j], shift = weights_.bias()[j] - largest_.get()[lane];
    float& logit = logits[j * tiling_.lane_ld + i];
    float before = f * logit + shift;
    logit = weights_.exact_product(j, row_at(chunk, i));
    float now = f * logit + shift, p = exp_of(all_lanes(now))[0];
    mass_[lane] += static_cast<double>(p) - exp_of(all_lanes(before))[0];
    if (result_.with_gap) gap_[lane] -= static_cast<double>(now) - before;
    if (!result_.pull) return;
    set(products() + (j / 2 * 2 * tiling_.lane_ld + 2 * i + j % 2), 0.0f);
    const Weight* w = weights_.row(j);
    float* pull = pull_.get() + k * depth * tiling_.lanes + i;
    for (int64_t d = 0; d < depth; d += kLanes) {
      int64_t count = std::min(kLanes, depth - d);
      Lanes x = load_part(w + d, count);
      for (int64_t n = 0; n < count; ++n) pull[(d + n) * tiling_.lanes] += p * f * x[n];
    }
  }

  const float* row_at(int64_t chunk, int64_t i) const {
    return problem_.rows + (chunk * tiling_.chunk + i) * problem_.num_features;
  }

  void add_pull(int64_t k) {
    int64_t lanes = tiling_.lanes, ld = tiling_.lane_ld, padded = weights_.padded_count();
    int64_t even = weights_.count() + weights_.count() % 2;
    for (int64_t at = even * ld; at < padded * ld; ++at) set(products() + at, 0.0f);
    float* pull = pull_.get() + k * problem_.num_features * lanes;
    multiply(problem_.num_features, lanes, padded, weights_.transposed(),
             weights_.transposed_ld(), products(), ld, pull, lanes, true);
  }

  // Exponentials take the place of the logits they are made of; those in planes have their own.
  PointerTo<Operand> products() const {
    if constexpr (std::is_same_v<Operand, Split>)
      return right_planes(planes_.get(), weights_.padded_count(), tiling_.lane_ld, true);
    else
      return reinterpret_cast<Operand*>(products_.get());
  }

  const Problem& problem_;
  const Tiling& tiling_;
  const PackedRows<Operand>& rows_;
  const Labels& labels_;
  const ForwardResult& result_;
  WeightTile<Weight, Operand> weights_;
  Buffer<float> products_;
  Buffer<Half> planes_;
  Buffer<float> largest_, tile_largest_, tile_mass_, tile_gap_, total_, pull_;
  std::vector<double> mass_, gap_, others_;
  std::vector<float> saved_;
  float share_ = kExactShare;
  int64_t next_ = 0;  // The next tile's first class; n if there is none.
};

// One row of a block from all threads' sums.
template <class Thread>
void merge_row(const std::vector<std::unique_ptr<Thread>>& threads, const Problem& problem,
               const Tiling& tiling, const ForwardResult& result, int64_t row, int64_t k) {
  int64_t lane = row % tiling.chunk, i = k * tiling.lanes + lane, depth = problem.num_features;
  float rival = kNoRival;
  for (const auto& thread : threads) rival = std::max(rival, thread->largest(i));
  double mass = 0, gap = 0;
  float* pull = result.pull ? result.pull + row * depth : nullptr;
  if (pull) std::fill_n(pull, depth, 0.0f);
  for (const auto& thread : threads) {
    double shrink = std::exp(static_cast<double>(thread->largest(i)) - rival);
    mass += thread->mass(i) * shrink;
    if (thread->others(i) > 0)
      gap += thread->gap(i) + thread->others(i) * (static_cast<double>(rival) - thread->largest(i));
    if (!pull) continue;
    const float* part = thread->pull(k) + lane;
    float factor = static_cast<float>(shrink);
    for (int64_t d = 0; d < depth; ++d) pull[d] += part[d * tiling.lanes] * factor;
  }
  result.rival[row] = rival;
  result.mass[row] = static_cast<float>(mass);
  result.gap[row] = result.with_gap ? static_cast<float>(gap) : 0.0f;
}

template <class Weight, class Operand>
void forward(const Problem& problem, const ForwardResult& result) {
  using Thread = ForwardThread<Weight, Operand>;
  Tiling tiling(problem);
  Labels labels(problem, tiling);
  PackedRows<Operand> rows(problem, tiling, false);
  int num_threads = static_cast<int>(std::min(problem.num_threads, tiling.num_tiles));
  std::vector<std::unique_ptr<Thread>> threads(num_threads);
  std::fill_n(result.label, problem.num_rows, kMinusInfinity);
  Pool& pool = Pool::of_process();
  pool.run(num_threads, [&](int t) {
    threads[t] = std::make_unique<Thread>(problem, tiling, rows, labels, result);
    for (int64_t chunk = t; chunk < tiling.num_chunks; chunk += num_threads) rows.pack(chunk);
  });
  for (int64_t block = 0; block < tiling.num_chunks; block += tiling.block) {
    int64_t num_chunks = std::min(tiling.block, tiling.num_chunks - block);
    int64_t first = block * tiling.chunk;
    int64_t last = std::min(first + num_chunks * tiling.chunk, problem.num_rows);
    pool.run(num_threads, [&](int t) {
      threads[t]->sweep(tiling.num_tiles * t / num_threads,
                        tiling.num_tiles * (t + 1) / num_threads, block, num_chunks);
    });
    pool.run(num_threads, [&](int t) {
      for (int64_t row = first + t; row < last; row += num_threads)
        merge_row(threads, problem, tiling, result, row, row / tiling.chunk - block);
    });
  }
}

}  // namespace dist_dml
