// What becomes of the gradient of one class's weights: `ClassStep` of class_sweeps.py, row by row.
#pragma once

#include <cmath>

#include "problem.hpp"

namespace dist_dml {

inline uint32_t mixed(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

inline BitLanes mixed(BitLanes x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

enum Rounding : int64_t { kNearest = 0, kStochastic = 1, kKahan = 2 };
enum Kind : int64_t { kSgd = 0, kAdam = 1, kAdamW = 2, kAdagrad = 3 };

// Numbers that all rows share, in float32 as the rule computes.
struct UpdateRule {
  explicit UpdateRule(const Update& update)
      : rate(update.learning_rate),
        decay(update.kind == kAdamW ? 0.0f : update.weight_decay),
        shrink(update.kind == kAdamW ? update.learning_rate * update.weight_decay : 0.0),
        momentum(update.momentum),
        beta(update.beta),
        beta_square(update.beta_square),
        new_share(1 - update.beta),
        new_square_share(1 - update.beta_square),
        mean_correction(1 / (1 - std::pow(update.beta, update.step))),
        square_correction(1 / (1 - std::pow(update.beta_square, update.step))),
        epsilon(update.epsilon),
        clip_norm(update.clip_norm),
        hash(mixed(static_cast<uint32_t>(update.seed) ^ static_cast<uint32_t>(update.step))) {}

  float rate, decay, shrink, momentum, beta, beta_square, new_share, new_square_share;
  float mean_correction, square_correction, epsilon, clip_norm;
  uint32_t hash;
};

inline void store_rounded(float* to, Lanes x, BitLanes, bool) { store(to, x); }

// `bits` lie in the lower halves.
inline void store_rounded(Half* to, Lanes x, BitLanes bits, bool stochastic) {
  store(to, stochastic ? bits_as<BitLanes>(x) + bits : nearest_half(x));
}

template <class Weight, class Moment>
class RowUpdate {
 public:
  RowUpdate(const Problem& problem, const Update& update)
      : update_(update), rule_(update), depth_(problem.num_features) {}

  // Updates weights and state of local class `id`. `gradient` (D, filled up with zeros) is scratch.
  void apply(Weight* weight, float* gradient, int64_t id) const {
    Moment* moment = static_cast<Moment*>(update_.moment);
    if (moment) moment += id * depth_;
    float* square = update_.square;
    if (square) square += update_.kind == kAdagrad ? id : id * depth_;
    Half* compensation = update_.compensation;
    if (compensation) compensation += id * depth_;
    clip(gradient);
    float step = update_.kind == kAdagrad ? adagrad_rate(weight, gradient, square) : rule_.rate;
    uint64_t global = static_cast<uint64_t>(id + update_.first_class);
    uint32_t hash = mixed(mixed(rule_.hash ^ static_cast<uint32_t>(global)) ^
                          static_cast<uint32_t>(global >> 32));
    int64_t d = 0;
    for (; d + kLanes <= depth_; d += kLanes)
      lanes_of_row(weight, gradient, moment, square, compensation, d, step, hash);
    if (d == depth_) return;
    // The end of a row: the same on copies of 16 numbers.
    int64_t part = depth_ - d;
    Weight weights[kLanes] = {};
    Moment moments[kLanes] = {};
    float squares[kLanes] = {};
    Half compensations[kLanes] = {};
    bool has_squares = square && update_.kind != kAdagrad;
    std::memcpy(weights, weight + d, part * sizeof(Weight));
    if (moment) std::memcpy(moments, moment + d, part * sizeof(Moment));
    if (has_squares) std::memcpy(squares, square + d, part * sizeof(float));
    if (compensation) std::memcpy(compensations, compensation + d, part * sizeof(Half));
    lanes_of_row(weights - d, gradient, moments - d, squares - d,
                 compensation ? compensations - d : nullptr, d, step, hash);
    std::memcpy(weight + d, weights, part * sizeof(Weight));
    if (moment) std::memcpy(moment + d, moments, part * sizeof(Moment));
    if (has_squares) std::memcpy(square + d, squares, part * sizeof(float));
    if (compensation) std::memcpy(compensation + d, compensations, part * sizeof(Half));
  }

 private:
  void clip(float* gradient) const {
    if (rule_.clip_norm <= 0) return;
    Lanes squares = Lanes{};
    for (int64_t d = 0; d < depth_; d += kLanes) {
      Lanes g = load(gradient + d);
      squares += g * g;
    }
    float norm = std::sqrt(sum(squares));
    if (!(norm > rule_.clip_norm)) return;
    float factor = rule_.clip_norm / norm;
    for (int64_t d = 0; d < depth_; d += kLanes) store(gradient + d, load(gradient + d) * factor);
  }

  // lr / (sqrt(s) + epsilon), after the row's mean square has been added to s.
  float adagrad_rate(const Weight* weight, const float* gradient, float* total) const {
    Lanes squares = Lanes{};
    for (int64_t d = 0; d < depth_; d += kLanes) {
      int64_t part = std::min(kLanes, depth_ - d);
      Lanes w = part == kLanes ? load(weight + d) : load_part(weight + d, part);
      Lanes g = load(gradient + d) + rule_.decay * w;
      squares += g * g;
    }
    *total += sum(squares) / depth_;
    return rule_.rate / (std::sqrt(*total) + rule_.epsilon);
  }

  // Sixteen numbers of a row. Decay reads the stored weights; the update reads the moments before
  // they are rounded.
  void lanes_of_row(Weight* weight, const float* gradient, Moment* moment, float* square,
                    Half* compensation, int64_t d, float rate, uint32_t hash) const {
    Lanes w = load(weight + d), g = load(gradient + d) + rule_.decay * w, change;
    bool stochastic = update_.rounding == kStochastic;
    BitLanes bits = BitLanes{};
    if (stochastic && (sizeof(Weight) == 2 || sizeof(Moment) == 2)) {
      BitLanes feature = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      bits = mixed((feature + static_cast<uint32_t>(d)) ^ hash);
    }
    if (update_.kind == kAdagrad || (update_.kind == kSgd && rule_.momentum == 0)) {
      change = rate * g;
    } else if (update_.kind == kSgd) {
      Lanes v = update_.step > 1 ? rule_.momentum * load(moment + d) + g : g;
      store_rounded(moment + d, v, bits >> 16, stochastic);
      change = rate * (update_.nesterov ? g + rule_.momentum * v : v);
    } else {
      Lanes m = rule_.beta * load(moment + d) + rule_.new_share * g;
      Lanes v = rule_.beta_square * load(square + d) + rule_.new_square_share * (g * g);
      store_rounded(moment + d, m, bits >> 16, stochastic);
      store(square + d, v);
      Lanes root = square_root(v * rule_.square_correction) + rule_.epsilon;
      change = rate * rule_.mean_correction * m / root + rule_.shrink * w;
    }
    if (compensation) {
      Lanes exact = w + load(compensation + d) - change;
      BitLanes rounded = nearest_half(exact);
      store_rounded(weight + d, bits_as<Lanes>(rounded), BitLanes{}, false);
      store(compensation + d, nearest_half(exact - bits_as<Lanes>(rounded)));
    } else {
      store_rounded(weight + d, w - change, bits & 0xffff, stochastic);
    }
  }

  const Update& update_;
  UpdateRule rule_;
  int64_t depth_;
};

}  // namespace dist_dml
