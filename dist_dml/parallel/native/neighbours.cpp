// The functions that `retrieval/native_neighbours.py` calls. Raw pointers in, no exception out: 0,
// or 1 and what went wrong.

#include "guarded.hpp"
#include "neighbours.hpp"

using namespace dist_dml;

extern "C" {

// Bytes of `packed`.
int64_t dist_dml_packed_bytes(const Gallery* gallery) {
  int64_t size = gallery->operand ? sizeof(Half) : sizeof(float);
  return gallery->num_tiles() * gallery->depth() * kItems * size;
}

int64_t dist_dml_bias_count(const Gallery* gallery) { return gallery->num_tiles() * kItems; }

// Fills `packed`, `bias` and `norms`.
int dist_dml_pack_gallery(const Gallery* gallery, char* message, int64_t size) {
  return guarded(message, size, [&] {
    if (gallery->operand) GalleryPacking<Half>(*gallery).run();
    else GalleryPacking<float>(*gallery).run();
  });
}

int dist_dml_search(const Gallery* gallery, const Queries* queries, char* message, int64_t size) {
  return guarded(message, size, [&] {
    if (gallery->operand) search_candidates<Half>(*gallery, *queries);
    else search_candidates<float>(*gallery, *queries);
  });
}

int dist_dml_search_all(const Gallery* gallery, const Queries* queries, char* message,
                        int64_t size) {
  return guarded(message, size, [&] { search_all(*gallery, *queries); });
}

// The values of pairs: queries (n, D), items (n, D).
int dist_dml_pair_values(const float* queries, const float* items, int64_t count, int64_t features,
                         int64_t squares, double* values, char* message, int64_t size) {
  return guarded(message, size, [&] {
    for (int64_t i = 0; i < count; ++i) {
      double key = pair_key(queries + i * features, items + i * features, features, squares);
      values[i] = squares ? key : -key;
    }
  });
}

}  // extern "C"
