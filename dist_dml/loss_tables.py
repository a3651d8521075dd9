"""What each loss reads, and its own values: tables beside `loss_config`.

Dimensions: C classes.
"""

from __future__ import annotations

from typing import Any

# What each loss reads besides name, similarity, init_std, tile_mebibytes, tile_dtype,
# class_weights and ignore_index. `scale` and `bias` depend on the similarity.
_LOGITS = ("scale", "temperature", "bias")
_COSINES = ("scale", "temperature")
READS: dict[str, tuple[str, ...]] = {
    "cross_entropy": (*_LOGITS, "label_smoothing", "smoothing"),
    "normalised_softmax": (*_COSINES, "label_smoothing", "smoothing"),
    "balanced_softmax": (*_LOGITS,),
    "cosface": (*_COSINES, "cosine_margin"),
    "arcface": (*_COSINES, "angle_margin"),
    "combined_margin": (*_COSINES, "angle_multiplier", "angle_margin", "cosine_margin"),
    "sub_centre_arcface": (*_COSINES, "angle_margin", "centres"),
    "dynamic_arcface": (*_COSINES, "dynamic_margin"),
    "adaface": (*_COSINES, "angle_margin", "norm_concentration", "norm_momentum"),
    "l1": (*_LOGITS, "sums"),
    "l2": (*_LOGITS, "p", "k", "a", "sums"),
    "binary_cross_entropy": (*_LOGITS,),
    "proxy_nca": (*_COSINES,),
    "proxy_anchor": (*_COSINES, "cosine_margin"),
    "soft_triple": (*_COSINES, "cosine_margin", "centres", "centre_temperature", "centre_spread"),
}
# Losses of pairs have no class weights. They read these besides name, ignore_index and what every
# one of them reads, `PAIR_KEYS`.
PAIR_READS: dict[str, tuple[str, ...]] = {
    "contrastive": ("comparison", "positive_margin", "negative_margin", "power", "reduction"),
    "c1": ("negative_margin",),
    "c2": ("positive_margin", "negative_margin"),
    "triplet": ("comparison", "triplet_margin", "mining", "reduction"),
    "multi_similarity": ("comparison", "alpha", "beta", "base", "mining_epsilon"),
    "snca": ("comparison", "scale", "temperature"),
    "fastap": ("bins",),
    "spce": (),
    "center": (),
}
PAIR_KEYS = ("memory_size", "memory_warmup_steps", "block_mebibytes", "label_sets")
PAIR_LOSSES = tuple(PAIR_READS)
# What rows may be compared by. The others have one comparison.
COMPARISONS: dict[str, tuple[str, ...]] = {
    "contrastive": ("l2", "squared_l2", "cosine", "inner"),
    "triplet": ("l2", "squared_l2", "cosine", "inner"),
    "multi_similarity": ("cosine", "inner"),
    "snca": ("cosine", "inner", "squared_l2"),
}
# Losses that exist for cosines only.
COSINE_LOSSES = tuple(name for name, keys in READS.items() if "bias" not in keys)
# Losses whose rows depend on each other: their batch cannot be cut into micro-batches.
COUPLED_LOSSES = ("proxy_anchor", "adaface", *PAIR_LOSSES)

# Sources: arcface_torch (s = 64; ArcFace 0.5, CosFace 0.4); sub-centre ArcFace (K = 3); dynamic
# margins of Google Landmark 2020's third place (a n^-1/4 + b: 0.5, 0.05); the codes of AdaFace,
# ProxyNCA++ (temperature 1/9), Proxy-Anchor (32, 0.1) and SoftTriple (20, 0.01, K = 10, 0.1, 0.2).
OWN_VALUES: dict[str, dict[str, Any]] = {
    "cosface": {"scale": 64.0, "cosine_margin": 0.4},
    "arcface": {"scale": 64.0, "angle_margin": 0.5},
    "combined_margin": {
        "scale": 64.0,
        "angle_multiplier": 1.0,
        "angle_margin": 0.3,
        "cosine_margin": 0.2,
    },
    "sub_centre_arcface": {"scale": 64.0, "angle_margin": 0.5, "centres": 3},
    "dynamic_arcface": {"scale": 64.0},
    "adaface": {"scale": 64.0, "angle_margin": 0.4},
    "proxy_nca": {"scale": 9.0},
    "proxy_anchor": {"scale": 32.0, "cosine_margin": 0.1},
    "soft_triple": {"scale": 20.0, "cosine_margin": 0.01, "centres": 10},
    # Paper B (2), which leaves its margin open (1: pytorch-metric-learning); paper C's C1 and C2.
    "contrastive": {
        "comparison": "l2",
        "positive_margin": 0.0,
        "negative_margin": 1.0,
        "power": 2,
        "reduction": "anchors",
    },
    "c1": {"negative_margin": 0.5},
    "c2": {"positive_margin": 0.0, "negative_margin": 0.5},
    "triplet": {"comparison": "l2", "reduction": "nonzero"},
    "multi_similarity": {"comparison": "cosine"},
    "snca": {"comparison": "cosine", "scale": 20.0},
}
