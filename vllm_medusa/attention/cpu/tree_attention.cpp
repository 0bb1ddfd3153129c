// SPDX-License-Identifier: Apache-2.0
// Attention of draft trees' rows over vLLM's paged KV cache on a CPU: one call a layer for all trees of a step.
//
// A unit of work is one KV head of up to kMaxRows rows of one tree, with all query heads that share the KV head. Its
// keys are taken in tiles with an online softmax in fp32 (FlashAttention-2). Units are laid end to end and cut into
// stretches of equal cost, one a thread, so a unit may begin on one thread and end on another; such units leave partial
// results, which are merged at the end (Flash-Decoding). Within one thread, a row's result depends on its own tree
// alone, whatever else is in the step.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

namespace {

using Vec = at::vec::Vectorized<float>;

constexpr int64_t kWidth = Vec::size();
constexpr int64_t kTile = 64;       // Keys whose scores are held at once.
constexpr int64_t kMaxRows = 32;    // Rows of a unit: bounds what a thread holds.
constexpr int64_t kStrip = 6;       // Rows of a product that are held in registers, two vectors each.
constexpr int64_t kChunk = 4 * kStrip;  // Rows whose scores are held at once.
constexpr int64_t kWordBits = 63;   // As step/trees.py packs ancestors.
constexpr float kInfinity = std::numeric_limits<float>::infinity();

static_assert(kTile % (2 * kWidth) == 0);

// What is the same for all layers of a step.
struct Trees {
  const int32_t* block_table;  // [trees, columns]
  int64_t columns;
  const int64_t* context;      // [trees]
  const int64_t* first_token;  // [trees]
  const int64_t* num_rows;     // [trees]
  const int64_t* depth;        // [tokens]
  const int64_t* ancestors;    // [tokens, words]
  int64_t words;
};

struct Layer {
  int64_t heads, kv_heads, head_dim, block_size;
  int64_t query_stride, query_head_stride, output_stride, output_head_stride, block_stride, kv_head_stride;
  float scale, soft_cap;
  int64_t window;              // -1: none
  const float* alibi_slopes;   // [heads] or null
  const float* sinks;          // [heads] or null
  int64_t group() const { return heads / kv_heads; }
};

struct Unit {
  int64_t tree, kv_head, first_row, rows;
  int64_t first_tile, tiles;  // Tiles before the first are out of every row's window.
  int64_t start;              // Cost of all units before.
  int64_t tile_cost() const { return rows + 1; }
  int64_t cost() const { return tiles * tile_cost(); }
};

// A unit's softmax over some of its keys: `sum` and `weighted` are relative to `maximum`.
struct Partial {
  float* maximum;   // [queries]
  float* sum;       // [queries]
  float* weighted;  // [queries, head_dim]
};

template <int64_t vectors, typename T>
inline void load(const T* from, Vec (&to)[vectors]) {
  if constexpr (std::is_same_v<T, float>) {
    for (int64_t v = 0; v < vectors; ++v) to[v] = Vec::loadu(from + v * kWidth);
  } else if constexpr (vectors == 2) {
    std::tie(to[0], to[1]) = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from));
  } else {
    to[0] = std::get<0>(at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from, kWidth)));
  }
}

// c[rows, width of the vectors] = a[rows, inner] b[inner, width], added to c where `accumulate`.
template <int64_t rows, int64_t vectors, bool accumulate, typename T>
inline void strip_product(
    const float* a, int64_t a_stride, const T* b, int64_t b_stride, float* c, int64_t c_stride, int64_t inner) {
  Vec total[rows][vectors];
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t v = 0; v < vectors; ++v)
      total[r][v] = accumulate ? Vec::loadu(c + r * c_stride + v * kWidth) : Vec(0.0f);
  for (int64_t k = 0; k < inner; ++k) {
    Vec right[vectors];
    load<vectors>(b + k * b_stride, right);
    for (int64_t r = 0; r < rows; ++r) {
      const Vec left(a[r * a_stride + k]);
      for (int64_t v = 0; v < vectors; ++v) total[r][v] = at::vec::fmadd(left, right[v], total[r][v]);
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t v = 0; v < vectors; ++v) total[r][v].store(c + r * c_stride + v * kWidth);
}

template <int64_t rows, bool accumulate, typename T>
void strip(
    const float* a, int64_t a_stride, const T* b, int64_t b_stride, float* c, int64_t c_stride, int64_t inner,
    int64_t width) {
  int64_t column = 0;
  for (; column + 2 * kWidth <= width; column += 2 * kWidth)
    strip_product<rows, 2, accumulate>(a, a_stride, b + column, b_stride, c + column, c_stride, inner);
  if (column < width) strip_product<rows, 1, accumulate>(a, a_stride, b + column, b_stride, c + column, c_stride, inner);
}

// c[rows, width] = a[rows, inner] b[inner, width], added to c where `accumulate`; width is a multiple of kWidth.
template <bool accumulate, typename T>
void product(
    const float* a, int64_t a_stride, const T* b, int64_t b_stride, float* c, int64_t c_stride, int64_t rows,
    int64_t inner, int64_t width) {
  for (int64_t row = 0; row < rows; row += kStrip) {
    const auto run = [&]<int64_t count>(std::integral_constant<int64_t, count>) {
      strip<count, accumulate>(
          a + row * a_stride, a_stride, b, b_stride, c + row * c_stride, c_stride, inner, width);
    };
    switch (std::min(kStrip, rows - row)) {
      case 1: run(std::integral_constant<int64_t, 1>{}); break;
      case 2: run(std::integral_constant<int64_t, 2>{}); break;
      case 3: run(std::integral_constant<int64_t, 3>{}); break;
      case 4: run(std::integral_constant<int64_t, 4>{}); break;
      case 5: run(std::integral_constant<int64_t, 5>{}); break;
      default: run(std::integral_constant<int64_t, kStrip>{});
    }
  }
}

inline Vec hyperbolic_tangent(const Vec& x) {
  return Vec(1.0f) - Vec(2.0f) / ((x + x).exp() + Vec(1.0f));
}

// One thread's memory for the scores of a chunk of queries, and for what is added to them.
struct Scratch {
  std::vector<float> query;                       // [queries, head_dim], scaled
  float scores[kChunk * kTile];                   // [chunk, kTile]
  float distance[kMaxRows * kTile];               // [rows, kTile]: each key's position less the row's own
  float bias[kMaxRows * kTile];                   // [rows, kTile]: 0, or -inf where the row does not see the key
};

template <typename T>
class Attention {
 public:
  Attention(const Trees& trees, const Layer& layer, const T* query, const T* cache, T* output)
      : trees_(trees), layer_(layer), query_(query), cache_(cache), output_(output) {}

  // Takes the unit's tiles from `begin` to `end`, excluded, both counted from its first one.
  void run(const Unit& unit, int64_t begin, int64_t end, Scratch& scratch, const Partial& partial) const {
    const int64_t group = layer_.group(), queries = unit.rows * group, dim = layer_.head_dim;
    load_query(unit, scratch);
    for (int64_t q = 0; q < queries; ++q) {
      // A sink is a key of its own, whose value is zero; it comes before all others.
      const bool sink = layer_.sinks != nullptr && begin == 0;
      partial.maximum[q] = sink ? layer_.sinks[unit.kv_head * group + q % group] : -kInfinity;
      partial.sum[q] = sink ? 1.0f : 0.0f;
    }
    std::fill(partial.weighted, partial.weighted + queries * dim, 0.0f);

    const int64_t context = trees_.context[unit.tree], keys = context + trees_.num_rows[unit.tree];
    for (int64_t tile = unit.first_tile + begin; tile < unit.first_tile + end; ++tile) {
      const int64_t in_block = tiles_per_block(), block = tile / in_block;
      const int64_t offset = tile % in_block * kTile, slot = block * layer_.block_size + offset;
      const int64_t count = std::min({kTile, layer_.block_size - offset, keys - slot});
      const int64_t padded = (count + kWidth - 1) / kWidth * kWidth;  // Blocks hold a multiple of 16 keys.
      const int64_t number = trees_.block_table[unit.tree * trees_.columns + block];
      const T* keys_of_block = cache_ + number * layer_.block_stride + unit.kv_head * layer_.kv_head_stride;
      const T* values_of_block = keys_of_block + layer_.block_size * dim;
      const bool masked = prepare_mask(unit, slot, count, scratch);
      for (int64_t first = 0; first < queries; first += kChunk) {
        const int64_t chunk = std::min(kChunk, queries - first);
        product<false>(
            scratch.query.data() + first * dim, dim, keys_of_block + offset, layer_.block_size, scratch.scores, kTile,
            chunk, dim, padded);
        for (int64_t q = 0; q < chunk; ++q)
          weigh(unit, first + q, count, padded, masked, scratch, scratch.scores + q * kTile, partial);
        product<true>(
            scratch.scores, kTile, values_of_block + offset * dim, dim, partial.weighted + first * dim, dim, chunk,
            count, dim);
      }
    }
  }

  // Adds `other` to `partial`.
  void merge(const Unit& unit, const Partial& partial, const Partial& other) const {
    const int64_t dim = layer_.head_dim;
    for (int64_t q = 0; q < unit.rows * layer_.group(); ++q) {
      const float maximum = std::max(partial.maximum[q], other.maximum[q]);
      if (maximum == -kInfinity) continue;
      const float own = std::exp(partial.maximum[q] - maximum), others = std::exp(other.maximum[q] - maximum);
      float* weighted = partial.weighted + q * dim;
      at::vec::map2<float>(
          [&](const Vec& one, const Vec& two) { return one * Vec(own) + two * Vec(others); }, weighted, weighted,
          other.weighted + q * dim, dim);
      partial.sum[q] = partial.sum[q] * own + other.sum[q] * others;
      partial.maximum[q] = maximum;
    }
  }

  void write(const Unit& unit, const Partial& partial) const {
    const int64_t group = layer_.group(), dim = layer_.head_dim;
    const int64_t token = trees_.first_token[unit.tree] + unit.first_row;
    for (int64_t q = 0; q < unit.rows * group; ++q) {
      T* to = output_ + (token + q / group) * layer_.output_stride +
          (unit.kv_head * group + q % group) * layer_.output_head_stride;
      const float* weighted = partial.weighted + q * dim;
      const float factor = 1.0f / partial.sum[q];
      for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<T>(weighted[d] * factor);
    }
  }

  int64_t tiles_per_block() const { return (layer_.block_size + kTile - 1) / kTile; }

 private:
  void load_query(const Unit& unit, Scratch& scratch) const {
    const int64_t group = layer_.group(), dim = layer_.head_dim;
    const int64_t token = trees_.first_token[unit.tree] + unit.first_row;
    scratch.query.resize(unit.rows * group * dim);
    for (int64_t q = 0; q < unit.rows * group; ++q) {
      const T* from = query_ + (token + q / group) * layer_.query_stride +
          (unit.kv_head * group + q % group) * layer_.query_head_stride;
      for (int64_t d = 0; d < dim; ++d) scratch.query[q * dim + d] = static_cast<float>(from[d]) * layer_.scale;
    }
  }

  // Fills the bias and the distances of a tile; returns whether some row does not see some key of it.
  bool prepare_mask(const Unit& unit, int64_t slot, int64_t count, Scratch& scratch) const {
    const int64_t context = trees_.context[unit.tree], root = trees_.first_token[unit.tree];
    const bool has_rows = slot + count > context;
    // The rows that see least of the context are the deepest; none is deeper than the tree has rows.
    const bool windowed = layer_.window > 0 && slot <= context + trees_.num_rows[unit.tree] - layer_.window;
    if (!has_rows && !windowed && layer_.alibi_slopes == nullptr) return false;
    for (int64_t r = 0; r < unit.rows; ++r) {
      const int64_t token = root + unit.first_row + r;
      const int64_t* ancestors = trees_.ancestors + token * trees_.words;
      for (int64_t j = 0; j < count; ++j) {
        const int64_t row = slot + j - context;
        const int64_t position = row < 0 ? row : trees_.depth[root + row];
        const int64_t distance = position - trees_.depth[token];
        const bool ancestor = row < 0 || (ancestors[row / kWordBits] >> (row % kWordBits) & 1) != 0;
        const bool near = layer_.window <= 0 || distance > -layer_.window;
        scratch.distance[r * kTile + j] = static_cast<float>(distance);
        scratch.bias[r * kTile + j] = ancestor && near ? 0.0f : -kInfinity;
      }
    }
    return has_rows || windowed;
  }

  // Turns one query's scores into weights relative to its new maximum, and what it holds already with them.
  void weigh(
      const Unit& unit, int64_t query, int64_t count, int64_t padded, bool masked, const Scratch& scratch,
      float* scores, const Partial& partial) const {
    const int64_t group = layer_.group(), row = query / group;
    if (layer_.soft_cap > 0) {
      const Vec cap(layer_.soft_cap), inverse(1.0f / layer_.soft_cap);
      for (int64_t j = 0; j < padded; j += kWidth)
        (hyperbolic_tangent(Vec::loadu(scores + j) * inverse) * cap).store(scores + j);
    }
    if (layer_.alibi_slopes != nullptr) {
      const float slope = layer_.alibi_slopes[unit.kv_head * group + query % group];
      for (int64_t j = 0; j < count; ++j) scores[j] += slope * scratch.distance[row * kTile + j];
    }
    if (masked)
      for (int64_t j = 0; j < count; ++j) scores[j] += scratch.bias[row * kTile + j];
    // Past the last key the cache holds anything.
    std::fill(scores + count, scores + padded, -kInfinity);

    Vec most = Vec::loadu(scores);
    for (int64_t j = kWidth; j < padded; j += kWidth) most = at::vec::maximum(most, Vec::loadu(scores + j));
    const float before = partial.maximum[query];
    const float maximum = std::max(
        before, at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return at::vec::maximum(x, y); }, most));
    if (maximum == -kInfinity) {
      std::fill(scores, scores + padded, 0.0f);
      return;
    }
    const Vec shift(maximum);
    Vec total(0.0f);
    for (int64_t j = 0; j < padded; j += kWidth) {
      const Vec weight = (Vec::loadu(scores + j) - shift).exp();
      weight.store(scores + j);
      total = total + weight;
    }
    const float sum = at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return x + y; }, total);
    if (maximum == before) {
      partial.sum[query] += sum;
      return;
    }
    const float factor = std::exp(before - maximum);
    float* weighted = partial.weighted + query * layer_.head_dim;
    for (int64_t d = 0; d < layer_.head_dim; d += kWidth) (Vec::loadu(weighted + d) * Vec(factor)).store(weighted + d);
    partial.sum[query] = partial.sum[query] * factor + sum;
    partial.maximum[query] = maximum;
  }

  const Trees trees_;
  const Layer layer_;
  const T* query_;
  const T* cache_;
  T* output_;
};

std::vector<Unit> units_of(const Trees& trees, const Layer& layer, int64_t num_trees, int64_t tiles_per_block) {
  std::vector<Unit> units;
  int64_t start = 0;
  for (int64_t tree = 0; tree < num_trees; ++tree) {
    const int64_t context = trees.context[tree], rows = trees.num_rows[tree];
    const auto tile_of = [&](int64_t slot) {
      return slot / layer.block_size * tiles_per_block + slot % layer.block_size / kTile;
    };
    // The root sees furthest back.
    const int64_t first_tile = layer.window > 0 ? tile_of(std::max<int64_t>(0, context - layer.window + 1)) : 0;
    const int64_t tiles = tile_of(context + rows - 1) + 1 - first_tile;
    for (int64_t head = 0; head < layer.kv_heads; ++head) {
      for (int64_t row = 0; row < rows; row += kMaxRows) {
        units.push_back({tree, head, row, std::min(kMaxRows, rows - row), first_tile, tiles, start});
        start += units.back().cost();
      }
    }
  }
  return units;
}

// A thread's part of a unit that other threads have a part of too.
struct Piece {
  int64_t unit;
  Partial partial;
};

template <typename T>
void attend(const Attention<T>& attention, const std::vector<Unit>& units, int64_t queries, int64_t dim) {
  const int64_t threads = at::get_num_threads(), total = units.back().start + units.back().cost();
  // A thread leaves at most two pieces: of the first and of the last unit that it has a part of.
  const int64_t partial_size = queries * (dim + 2);
  const auto memory = std::make_unique_for_overwrite<float[]>(threads * 2 * partial_size);
  const auto partial_at = [&](int64_t index) {
    float* const begin = memory.get() + index * partial_size;
    return Partial{begin, begin + queries, begin + 2 * queries};
  };
  std::vector<std::vector<Piece>> pieces(threads);
  at::parallel_for(0, threads, 1, [&](int64_t first_thread, int64_t last_thread) {
    Scratch scratch;
    for (int64_t thread = first_thread; thread < last_thread; ++thread) {
      const int64_t low = total * thread / threads, high = total * (thread + 1) / threads;
      auto unit = std::upper_bound(
          units.begin(), units.end(), low, [](int64_t cost, const Unit& each) { return cost < each.start; });
      for (--unit; unit != units.end() && unit->start < high; ++unit) {
        // A tile belongs to the stretch that its first bit of cost lies in.
        const auto tile_at = [&](int64_t cost) {
          return std::clamp<int64_t>((cost - unit->start + unit->tile_cost() - 1) / unit->tile_cost(), 0, unit->tiles);
        };
        const int64_t begin = low <= unit->start ? 0 : tile_at(low), end = tile_at(high);
        if (begin == end) continue;
        const Partial partial = partial_at(2 * thread + static_cast<int64_t>(!pieces[thread].empty()));
        attention.run(*unit, begin, end, scratch, partial);
        if (begin == 0 && end == unit->tiles) {
          attention.write(*unit, partial);
        } else {
          pieces[thread].push_back({unit - units.begin(), partial});
        }
      }
    }
  });
  // Pieces come in the order of their units.
  std::vector<Piece> all;
  for (const auto& each : pieces) all.insert(all.end(), each.begin(), each.end());
  for (size_t first = 0, next = 0; first < all.size(); first = next) {
    const Unit& unit = units[all[first].unit];
    for (next = first + 1; next < all.size() && all[next].unit == all[first].unit; ++next)
      attention.merge(unit, all[first].partial, all[next].partial);
    attention.write(unit, all[first].partial);
  }
}

}  // namespace

// See attention/cpu/fused.py for shapes and meaning.
void tree_attention(
    const at::Tensor& query, const at::Tensor& kv_cache, at::Tensor& output, const at::Tensor& block_table,
    const at::Tensor& context, const at::Tensor& first_token, const at::Tensor& num_rows, const at::Tensor& depths,
    const at::Tensor& ancestor_bits, double scale, double soft_cap, int64_t window,
    const std::optional<at::Tensor>& alibi_slopes, const std::optional<at::Tensor>& sinks) {
  const int64_t num_trees = context.size(0);
  if (num_trees == 0) return;
  const int64_t dim = query.size(2), block_size = kv_cache.size(2);
  TORCH_CHECK(kv_cache.scalar_type() == query.scalar_type() && output.scalar_type() == query.scalar_type());
  TORCH_CHECK(dim % 16 == 0 && block_size % 16 == 0 && kv_cache.size(3) == 2 * dim);
  TORCH_CHECK(query.stride(2) == 1 && output.stride(2) == 1);
  TORCH_CHECK(kv_cache.stride(3) == 1 && kv_cache.stride(2) == 2 * dim);
  for (const at::Tensor& each : {context, first_token, num_rows, depths, ancestor_bits})
    TORCH_CHECK(each.is_contiguous() && each.scalar_type() == at::kLong);
  TORCH_CHECK(block_table.is_contiguous() && block_table.scalar_type() == at::kInt);

  const Trees trees{
      block_table.const_data_ptr<int32_t>(), block_table.size(1),
      context.const_data_ptr<int64_t>(),     first_token.const_data_ptr<int64_t>(),
      num_rows.const_data_ptr<int64_t>(),    depths.const_data_ptr<int64_t>(),
      ancestor_bits.const_data_ptr<int64_t>(), ancestor_bits.size(1)};
  const Layer layer{
      query.size(1), kv_cache.size(1), dim, block_size,
      query.stride(0), query.stride(1), output.stride(0), output.stride(1), kv_cache.stride(0), kv_cache.stride(1),
      static_cast<float>(scale), static_cast<float>(soft_cap), window,
      alibi_slopes ? alibi_slopes->const_data_ptr<float>() : nullptr,
      sinks ? sinks->const_data_ptr<float>() : nullptr};
  const int64_t most_rows = *std::max_element(trees.num_rows, trees.num_rows + num_trees);
  const int64_t queries = std::min(most_rows, kMaxRows) * layer.group();

  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, query.scalar_type(), "tree_attention", [&] {
        if constexpr (!std::is_same_v<scalar_t, double>) {
          const Attention<scalar_t> attention(
              trees, layer, query.const_data_ptr<scalar_t>(), kv_cache.const_data_ptr<scalar_t>(),
              output.mutable_data_ptr<scalar_t>());
          attend(attention, units_of(trees, layer, num_trees, attention.tiles_per_block()), queries, dim);
        } else {
          TORCH_CHECK(false, "tree_attention takes float32, bfloat16 and float16");
        }
      });
}

TORCH_LIBRARY(vllm_medusa, library) {
  library.def(
      "tree_attention(Tensor query, Tensor kv_cache, Tensor(a!) output, Tensor block_table, Tensor context, "
      "Tensor first_token, Tensor num_rows, Tensor depths, Tensor ancestor_bits, float scale, float soft_cap, "
      "int window, Tensor? alibi_slopes, Tensor? sinks) -> ()",
      &tree_attention);
}
