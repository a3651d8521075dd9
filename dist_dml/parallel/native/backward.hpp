// The backward sweep: logits again, their gradient, the weights' gradient, its use. A tile's result
// depends on no other tile, so threads take tiles as they come.
#pragma once

#include <atomic>

#include "forward.hpp"
#include "update.hpp"

namespace dist_dml {

// What the gradient rule needs of each lane; lanes without a row get 0 whatever their logit.
struct LaneCoefficients {
  LaneCoefficients(const Problem& problem, const Tiling& tiling, const BackwardTask& task)
      : normaliser(tiling.num_chunks * tiling.lanes, std::numeric_limits<float>::max()),
        factor(tiling.num_chunks * tiling.lanes, 0.0f),
        offset(tiling.num_chunks * tiling.lanes, 0.0f) {
    for (int64_t i = 0; i < problem.num_rows; ++i) {
      int64_t lane = i / tiling.chunk * tiling.lanes + i % tiling.chunk;
      normaliser[lane] = task.normaliser[i];
      factor[lane] = task.factor[i];
      offset[lane] = task.offset[i];
      has_offsets |= task.offset[i] != 0;
    }
  }
  std::vector<float> normaliser, factor, offset;
  bool has_offsets = false;
};

inline void store_gradient(float* to, Lanes x, Lanes y) {
  store(to, x);
  store(to + kLanes, y);
}
inline void store_gradient(Half* to, Lanes x, Lanes y) { store_halves(to, x, y); }
inline void store_gradient(SplitPointer to, Lanes x, Lanes y) {
  store_halves(to.high, x, y);
  store_halves(to.rest, x - rounded_to_half(x), y - rounded_to_half(y));
}

inline Lanes load(SplitPointer from) { return load(from.high) + load(from.rest); }

// G = factor exp(f s + b - normaliser) - offset of `count` classes, and its sums over lanes.
// Returns the largest exponential; `kChecked`: or NaN where one is. `out`
// may be `logits`: stores stay behind loads. `ahead(j)` is called once a class.
template <bool kChecked, class Out, class Ahead>
inline float logit_gradients(const float* logits, int64_t count, int64_t lanes, int64_t ld,
                            const float* factors, const float* bias, const float* normaliser,
                            const float* factor, const float* offset, Out out, int64_t out_ld,
                            float* sums, Ahead ahead) {
  Lanes most = Lanes{};
  IntLanes numbers = IntLanes{} - 1;
  for (int64_t j = 0; j < count; ++j) {
    ahead(j);
    const float* from = logits + j * ld;
    Lanes f = all_lanes(factors[j]), b = all_lanes(bias[j]), total = Lanes{};
    for (int64_t i = 0; i < lanes; i += 2 * kLanes) {
      Lanes p = exp_of(f * load(from + i) + b - load(normaliser + i));
      Lanes q = exp_of(f * load(from + i + kLanes) + b - load(normaliser + i + kLanes));
      most = larger(larger(p, q), most);
      if constexpr (kChecked) numbers &= (p == p) & (q == q);
      p = load(factor + i) * p - load(offset + i);
      q = load(factor + i + kLanes) * q - load(offset + i + kLanes);
      total += p + q;
      store_gradient(out + j * out_ld + i, p, q);
    }
    sums[j] = sum(total);
  }
  if (kChecked && any(~numbers)) return std::numeric_limits<float>::quiet_NaN();
  float largest = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) largest = std::max(largest, most[lane]);
  return largest;
}

// An entry of a tile's logits' gradient that is applied in float32: class and row within tile, chunk.
struct ExactEntry {
  int64_t column, row;
  float gradient;
};

template <class Weight, class Operand>
class BackwardThread {
  static constexpr bool kSplit = std::is_same_v<Operand, Split>;

 public:
  BackwardThread(const Problem& problem, const Tiling& tiling, const PackedRows<Operand>& rows,
                 const Labels& labels, const LaneCoefficients& lanes, const BackwardTask& task)
      : problem_(problem),
        tiling_(tiling),
        rows_(rows),
        labels_(labels),
        lanes_(lanes),
        task_(task),
        with_gradient_(task.gradient || task.update),
        filter_(lanes.has_offsets ? 0.0f : problem.filter_below),
        weights_(problem, tiling, false),
        logits_(tiling.tile * tiling.lane_ld),
        sums_(tiling.tile),
        gradient_(with_gradient_ ? tiling.tile * tiling.features : 0),
        out_ld_(std::is_same_v<Operand, Split> ? Tiling::apart(2 * tiling.lanes)
                                                : tiling.lane_ld),
        planes_(std::is_same_v<Operand, Split> ? tiling.tile * out_ld_ : 0) {}

  // One tile from logits to update, while memory of the next one is asked for. Returns the mass
  // that was left out.
  double process(int64_t tile, int64_t next_tile) {
    int64_t first = tile * tiling_.tile;
    weights_.take(first, std::min(tiling_.tile, problem_.num_classes - first));
    float* bias_gradient = task_.bias_gradient ? task_.bias_gradient + first : unasked_.get();
    std::fill_n(bias_gradient, weights_.count(), 0.0f);
    next_ = std::min(next_tile * tiling_.tile, problem_.num_classes);
    started_ = false;
    double left_out = 0;
    for (int64_t chunk = 0; chunk < tiling_.num_chunks; ++chunk)
      left_out += add_chunk(chunk, bias_gradient);
    if (!started_ && tiling_.num_chunks > 0) filtered_ += weights_.count();
    if (!with_gradient_) return left_out;
    if (!started_) std::fill_n(gradient_.get(), weights_.count() * tiling_.features, 0.0f);
    for (int64_t j = 0; j < weights_.count(); ++j) {
      prefetch_next(j);
      use_row(j);
    }
    return left_out;
  }

  int64_t filtered() const { return filtered_; }

 private:
  double add_chunk(int64_t chunk, float* bias_gradient) {
    int64_t lanes = tiling_.lanes, ld = tiling_.lane_ld;
    int64_t count = weights_.count(), first = weights_.first();
    float* logits = logits_.get();
    if (task_.kept)
      logits = const_cast<float*>(task_.kept) +
               (chunk * (problem_.num_classes + 1) + first) * ld;
    else
      multiply(count, lanes, weights_.depth(), weights_.operand(), weights_.operand_ld(),
               rows_.transposed(chunk), ld, logits, ld, false);
    auto own = labels_.of_tile(chunk, first, count);
    saved_.clear();
    for (const LabelEntry& entry : own) {
      float& logit = logits[(entry.column - first) * ld + entry.row];
      saved_.push_back(logit);
      logit = kMinusInfinity;
    }
    PointerTo<Operand> out;
    if constexpr (std::is_same_v<Operand, Split>)
      out = left_planes(planes_.get(), lanes, false);
    else
      out = reinterpret_cast<Operand*>(logits_.get());
    auto run = [&](auto checked) {
      return logit_gradients<decltype(checked)::value>(
          logits, count, lanes, ld, weights_.factor(), weights_.bias(),
          lanes_.normaliser.data() + chunk * lanes, lanes_.factor.data() + chunk * lanes,
          lanes_.offset.data() + chunk * lanes, out, out_ld_, sums_.get(), [&](int64_t j) {
            if (chunk + 1 == tiling_.num_chunks) prefetch_state(j);
          });
    };
    float most = filter_ > 0 ? run(std::true_type{}) : run(std::false_type{});
    if (most < filter_ && own.empty()) return mass(out, count);
    exact_.clear();
    if constexpr (kSplit)
      if (!(most <= kExactShare)) make_large_exact(logits, chunk, out);
    size_t index = 0;
    for (const LabelEntry& entry : own) {
      int64_t j = entry.column - first, row = chunk * tiling_.chunk + entry.row;
      if (task_.kept) logits[j * ld + entry.row] = saved_[index++];
      if constexpr (kSplit) make_exact(out, j, entry.row, task_.label[row]);
      else set(out + j * out_ld_ + entry.row, task_.label[row]);
      sums_.get()[j] += task_.label[row] + task_.offset[row];
    }
    for (int64_t j = 0; j < count; ++j) bias_gradient[j] += sums_.get()[j];
    if (with_gradient_)
      multiply(count, rows_.depth, rows_.plain_count(chunk), out, out_ld_, rows_.plain(chunk),
               rows_.plain_ld(), gradient_.get(), tiling_.features, started_);
    started_ = true;
    if (with_gradient_)
      for (const ExactEntry& entry : exact_) add_exact(entry, chunk);
    return 0;
  }

  // Finds the classes of a tile that hold more than `kExactShare` of a row, and computes their
  // logits' gradients in float32.
  void make_large_exact(const float* logits, int64_t chunk, PointerTo<Operand> out) {
    int64_t ld = tiling_.lane_ld, of_chunk = chunk * tiling_.lanes;
    static const float least = std::log(kExactShare);
    for (int64_t j = 0; j < weights_.count(); ++j) {
      float f = weights_.factor()[j], b = weights_.bias()[j];
      Lanes fs = all_lanes(f), bs = all_lanes(b);
      for (int64_t i = 0; i < tiling_.lanes; i += kLanes) {
        Lanes normalisers = load(lanes_.normaliser.data() + of_chunk + i);
        Lanes x = fs * load(logits + j * ld + i) + bs - normalisers;
        IntLanes large = x > least;
        if (!any(large)) continue;
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          if (!large[lane]) continue;
          int64_t row = chunk * tiling_.chunk + i + lane, at = of_chunk + i + lane;
          float s = weights_.exact_product(j, problem_.rows + row * problem_.num_features);
          float now = f * s + b - normalisers[lane];
          Lanes p = exp_of(all_lanes(x[lane])), q = exp_of(all_lanes(now));
          sums_.get()[j] += lanes_.factor[at] * (q[0] - p[0]);
          make_exact(out, j, i + lane, lanes_.factor[at] * q[0] - lanes_.offset[at]);
        }
      }
    }
  }

  // Takes an entry of the logits' gradient out of the product.
  void make_exact(PointerTo<Operand> out, int64_t j, int64_t i, float g) {
    set(out + j * out_ld_ + i, 0.0f);
    exact_.push_back({j, i, g});
  }

  void add_exact(const ExactEntry& entry, int64_t chunk) {
    int64_t depth = problem_.num_features;
    const float* x = problem_.rows + (chunk * tiling_.chunk + entry.row) * depth;
    float* to = gradient_.get() + entry.column * tiling_.features;
    for (int64_t d = 0; d < depth; ++d) to[d] += entry.gradient * x[d];
  }

  // The state of class j, if it has a number for each of the weights.
  void prefetch_state(int64_t j) const {
    if (!task_.update || !task_.update->moment) return;
    const Update& update = *task_.update;
    int64_t depth = problem_.num_features, at = problem_.weight_row(weights_.first() + j) * depth;
    if (update.moment_is_half) prefetch(static_cast<const Half*>(update.moment) + at, depth);
    else prefetch(static_cast<const float*>(update.moment) + at, depth);
    if (update.square && update.kind != kAdagrad) prefetch(update.square + at, depth);
  }

  void prefetch_next(int64_t j) const {
    if (j < problem_.num_classes - next_)
      prefetch(weight_at<Weight>(problem_, next_ + j), problem_.num_features);
  }

  // Sum of |G|: without offsets, |factor| times the probabilities; 0 in lanes without a row.
  double mass(PointerTo<Operand> out, int64_t count) const {
    double total = 0;
    for (int64_t j = 0; j < count; ++j) {
      Lanes row = Lanes{};
      for (int64_t i = 0; i < tiling_.lanes; i += kLanes) {
        Lanes g = load(out + j * out_ld_ + i);
        row += larger(g, -g);
      }
      total += sum(row);
    }
    return total;
  }

  // Turns dL/d(f w) into dL/dw, for cosines f (a - (a . w) w / |w|^2), and hands it on.
  void use_row(int64_t j) {
    int64_t depth = problem_.num_features, padded = rounded_up(depth, kLanes);
    float* a = gradient_.get() + j * tiling_.features;
    const Weight* w = weights_.row(j);
    for (int64_t d = depth; d < padded; ++d) a[d] = 0.0f;
    if (problem_.scale != 0) {
      auto weight = [&](int64_t d) {
        return d + kLanes <= depth ? load(w + d) : load_part(w + d, depth - d);
      };
      Lanes along = Lanes{};
      for (int64_t d = 0; d < padded; d += kLanes) along += load(a + d) * weight(d);
      float f = weights_.factor()[j], share = f * (sum(along) / weights_.square()[j]);
      for (int64_t d = 0; d < padded; d += kLanes)
        store(a + d, f * load(a + d) - share * weight(d));
    }
    int64_t id = problem_.weight_row(weights_.first() + j);
    if (task_.update) {
      if (task_.update->moment_is_half) update_half_.apply(weights_.row(j), a, id);
      else update_float_.apply(weights_.row(j), a, id);
      return;
    }
    float* to = task_.gradient + id * depth;
    for (int64_t d = 0; d < depth; ++d) to[d] = task_.accumulate ? to[d] + a[d] : a[d];
  }

  static const Update& update_of(const BackwardTask& task) {
    static const Update none{};
    return task.update ? *task.update : none;
  }

  const Problem& problem_;
  const Tiling& tiling_;
  const PackedRows<Operand>& rows_;
  const Labels& labels_;
  const LaneCoefficients& lanes_;
  const BackwardTask& task_;
  bool with_gradient_;
  float filter_;
  WeightTile<Weight, Operand> weights_;
  Buffer<float> logits_, sums_, gradient_;
  int64_t out_ld_;  // Of the logits' gradient, which takes the logits' place unless in planes.
  Buffer<Half> planes_;
  Buffer<float> unasked_{tiling_.tile};  // A tile's gradient of biases that nobody asked for.
  RowUpdate<Weight, float> update_float_{problem_, update_of(task_)};
  RowUpdate<Weight, Half> update_half_{problem_, update_of(task_)};
  std::vector<float> saved_;
  std::vector<ExactEntry> exact_;
  bool started_ = false;
  int64_t next_ = 0, filtered_ = 0;
};

template <class Weight, class Operand>
void backward(const Problem& problem, const BackwardTask& task) {
  Tiling tiling(problem);
  Labels labels(problem, tiling);
  LaneCoefficients lanes(problem, tiling, task);
  PackedRows<Operand> rows(problem, tiling, true);
  int num_threads = static_cast<int>(std::min(problem.num_threads, tiling.num_tiles));
  Pool& pool = Pool::of_process();
  pool.run(num_threads, [&](int t) {
    for (int64_t chunk = t; chunk < tiling.num_chunks; chunk += num_threads) rows.pack(chunk);
  });
  // One number a tile, so that the sum does not depend on which thread took which tile.
  std::vector<double> left_out(problem.filter_below > 0 ? tiling.num_tiles : 0);
  std::vector<int64_t> filtered(num_threads);
  std::atomic<int64_t> next{0};
  pool.run(num_threads, [&](int t) {
    ReleaseProducts release(!std::is_same_v<Operand, float>);
    BackwardThread<Weight, Operand> thread(problem, tiling, rows, labels, lanes, task);
    int64_t tile = next.fetch_add(1);
    for (int64_t after; tile < tiling.num_tiles; tile = after) {
      after = next.fetch_add(1);
      double mass = thread.process(tile, after);
      if (!left_out.empty()) left_out[tile] = mass;
    }
    filtered[t] = thread.filtered();
  });
  *task.filtered_classes = 0;
  *task.filtered_mass = 0;
  for (int64_t count : filtered) *task.filtered_classes += count;
  for (double mass : left_out) *task.filtered_mass += mass;
}

}  // namespace dist_dml
