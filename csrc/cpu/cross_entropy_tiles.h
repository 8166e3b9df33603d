// Cross-entropy where lanes are positions and not classes: logits whose classes are strided (N, C, d1, ...), which are
// read without a transposing copy, and rows of few classes, of which a register would be mostly empty.
//
// A tile is up to kPositions positions x C classes, copied into scratch as values of the accumulation type, one row of
// kPositions a class. Memory is read and written once, as for rows.
#pragma once

#include <memory>

#include "cross_entropy_rows.h"

namespace fusedtricks::FT_ISA {

template <class A>
inline constexpr int kVectors = 4;
// Beyond this the scratch of a tile leaves the caches, and a plain copy of the logits is the better way.
inline constexpr int64_t kMostTileClasses = 8192;
template <class A>
inline constexpr int kPositions = kVectors<A> * kLanes<A>;

// Where the positions of a tile are. Strided: at base + p, class stride `step`. Otherwise rows of their own.
template <class T>
struct TileMemory {
  T* base;
  int64_t step;
  int64_t offset[kPositions<Acc<T>>];
};

// The leading dimensions of out, logits, a dense tensor and the probabilities, and how the classes lie in them.
struct Layout {
  Tensor x, out, t;
  Rows<4> rows;
  int64_t classes, x_step, out_step, t_step;
  bool strided;  // positions are adjacent, classes are not
  bool copies;   // `out` stands in for a tensor of another layout
};

// f(p, lanes) over registers of `count` positions.
template <class A, class F>
inline void each_register(int count, const F& f) {
  for (int p = 0; p < count; p += kLanes<A>) {
    if (count - p >= kLanes<A>) {
      f(p, Full{});
    } else {
      f(p, Tail{count - p});
    }
  }
}

// Positions beyond `count` are left as they are: finite numbers.
template <bool Strided, class T, class A = Acc<std::remove_const_t<T>>>
inline void read_tile(const TileMemory<const T>& from, int64_t classes, int count, A* to) {
  if constexpr (Strided) {
    for (int64_t c = 0; c < classes; ++c, to += kPositions<A>) {
      each_register<A>(count,
                       [&](int p, auto lanes) { store(to + p, load(from.base + c * from.step + p, lanes), Full{}); });
    }
  } else if constexpr (std::is_same_v<T, A>) {
    for (int p = 0; p < count; ++p) {
      const T* row = from.base + from.offset[p];
      for (int64_t c = 0; c < classes; ++c) to[c * kPositions<A> + p] = row[c];
    }
  } else {
    for (int p = 0; p < count; ++p) {
      const T* row = from.base + from.offset[p];
      sweep<A, 1>(0, classes, [&](int64_t j, auto lanes, int) {
        const auto v = load(row + j, lanes);
        const int n = std::is_same_v<decltype(lanes), Full> ? kLanes<A> : static_cast<int>(classes - j);
        A value[kLanes<A>];
        std::memcpy(value, &v, sizeof v);
        for (int i = 0; i < n; ++i) to[(j + i) * kPositions<A> + p] = value[i];
      });
    }
  }
}

template <bool Strided, class T, class A = Acc<T>>
inline void write_tile(const A* from, int64_t classes, int count, const TileMemory<T>& to) {
  if constexpr (Strided) {
    for (int64_t c = 0; c < classes; ++c, from += kPositions<A>) {
      each_register<A>(count,
                       [&](int p, auto lanes) { store(to.base + c * to.step + p, load(from + p, Full{}), lanes); });
    }
  } else if constexpr (std::is_same_v<T, A>) {
    for (int p = 0; p < count; ++p) {
      T* row = to.base + to.offset[p];
      for (int64_t c = 0; c < classes; ++c) row[c] = from[c * kPositions<A> + p];
    }
  } else {
    for (int p = 0; p < count; ++p) {
      T* row = to.base + to.offset[p];
      sweep<A, 1>(0, classes, [&](int64_t j, auto lanes, int) {
        const int n = std::is_same_v<decltype(lanes), Full> ? kLanes<A> : static_cast<int>(classes - j);
        A value[kLanes<A>] = {};
        for (int i = 0; i < n; ++i) value[i] = from[(j + i) * kPositions<A> + p];
        Vec<A> v;
        std::memcpy(&v, value, sizeof v);
        store(row + j, v, lanes);
      });
    }
  }
}

// One number a position.
template <class A>
struct PerPosition {
  alignas(kVecBytes) A at[kPositions<A>] = {};

  Vec<A> operator[](int v) const { return load(at + v * kLanes<A>, Full{}); }
  void set(int v, Vec<A> value) { store(at + v * kLanes<A>, value, Full{}); }
};

template <class T, class P, bool Plain>
struct Tile {
  using A = Acc<T>;
  static constexpr int V = kVectors<A>, L = kLanes<A>;
  const Loss<T, P, Plain>& loss;
  A* z;      // (C, kPositions): logits, then z, then exponentials, then the gradient
  A* slope;  // dz / dx, unless Plain
  A* t;      // class probabilities
  PerPosition<A> top, logsum, sum, rest, q, za, zb;

  // z and dz / dx in place of the logits.
  void scale() {
    if constexpr (Plain) return;
    for (int64_t i = 0; i < loss.classes * kPositions<A>; i += L) {
      const auto x = load(z + i, Full{});
      store(slope + i, loss.z.slope(x), Full{});
      store(z + i, loss.z(x), Full{});
    }
  }

  void find_top() {
    Vec<A> most[V];
    for (int v = 0; v < V; ++v) most[v] = broadcast(-std::numeric_limits<A>::infinity());
    for (int64_t c = 0; c < loss.classes; ++c) {
      for (int v = 0; v < V; ++v) most[v] = larger<A>(load(z + c * kPositions<A> + v * L, Full{}), most[v]);
    }
    for (int v = 0; v < V; ++v) top.set(v, most[v]);
  }

  // exp(z - top) in place of z, and its sum, and the others of `row_sums`.
  template <bool Probabilities>
  void add_up() {
    // Blocks of classes are summed separately, so that rounding does not grow with their number.
    constexpr int64_t kBlock = 256;
    for (int v = 0; v < V; ++v) sum.set(v, Vec<A>{}), rest.set(v, Vec<A>{}), q.set(v, Vec<A>{});
    for (int64_t begin = 0; begin < loss.classes; begin += kBlock) {
      const int64_t end = std::min(loss.classes, begin + kBlock);
      for (int v = 0; v < V; ++v) {
        const Vec<A> most = top[v];
        Vec<A> s{}, r{}, m{};
        for (int64_t c = begin; c < end; ++c) {
          A* at = z + c * kPositions<A> + v * L;
          const Vec<A> centred = load(at, Full{}) - most, e = exp<A>(centred);
          store(at, e, Full{});
          s += e;
          const A w = loss.weight_at(c);
          if constexpr (Probabilities) {
            const Vec<A> here = loss.q(load(t + c * kPositions<A> + v * L, Full{}), broadcast(w));
            r += here != A(0) ? here * centred : Vec<A>{};
            m += here;
          } else if (Plain || w != A(0)) {
            r += w * centred;
          }
        }
        sum.set(v, sum[v] + s), rest.set(v, rest[v] + r), q.set(v, q[v] + m);
      }
    }
    for (int v = 0; v < V; ++v) logsum.set(v, log<A>(sum[v]));
  }

  // For a backward: exp(z - top) in place of z.
  void exponentiate() {
    for (int v = 0; v < V; ++v) logsum.set(v, log<A>(sum[v]));
    for (int v = 0; v < V; ++v) {
      const Vec<A> most = top[v];
      for (int64_t c = 0; c < loss.classes; ++c) {
        A* at = z + c * kPositions<A> + v * L;
        store(at, exp<A>(load(at, Full{}) - most), Full{});
      }
    }
  }

  // The gradient in place of exponentials.
  template <bool Probabilities>
  void differentiate(const RowTarget<A>* target, const RowSlope<A>* slopes, int count) {
    PerPosition<A> k, g;
    for (int p = 0; p < count; ++p) {
      k.at[p] = slopes[p].softmax * (A(1) / sum.at[p]);
      g.at[p] = Probabilities ? slopes[p].g : slopes[p].g * target[p].off;
    }
    for (int v = 0; v < V; ++v) {
      const Vec<A> kv = k[v], gv = g[v];
      for (int64_t c = 0; c < loss.classes; ++c) {
        A* at = z + c * kPositions<A> + v * L;
        const A w = loss.weight_at(c);
        Vec<A> q = broadcast(w);
        if constexpr (Probabilities) q = loss.q(load(t + c * kPositions<A> + v * L, Full{}), q);
        store(at, kv * load(at, Full{}) - gv * q, Full{});
      }
    }
    for (int p = 0; p < count; ++p) {
      if constexpr (!Probabilities) {
        z[target[p].a * kPositions<A> + p] -= slopes[p].g * target[p].at_a;
        z[target[p].b * kPositions<A> + p] -= slopes[p].g * target[p].at_b;
      }
      if (slopes[p].zero) {
        for (int64_t c = 0; c < loss.classes; ++c) z[c * kPositions<A> + p] = 0;
      }
    }
    if constexpr (!Plain) {
      for (int64_t i = 0; i < loss.classes * kPositions<A>; i += L) {
        store(z + i, load(z + i, Full{}) * load(slope + i, Full{}), Full{});
      }
    }
  }
};

// A tile: how many positions, their rows of a dense tensor, and where their logits, result and probabilities are.
template <class T, class P>
struct Positions {
  static constexpr int kP = kPositions<Acc<T>>;
  int count;
  int64_t row[kP];
  TileMemory<const T> x;
  TileMemory<const P> t;
  TileMemory<T> out;
};

// All tiles, each a position of `cost` elements at a time. worker(scratch) gives what is called with every tile of a
// thread; `scratch` is zero, `planes` of (classes, kPositions).
template <bool Strided, class T, class P, class Worker, class A = Acc<T>>
void each_tile(const Layout& l, T* out, int planes, int64_t cost, const Worker& worker) {
  constexpr int kP = kPositions<A>;
  const T* x = static_cast<const T*>(l.x.const_data_ptr());
  const P* t = static_cast<const P*>(l.t.const_data_ptr());
  // Tiles of neighbours stay inside the innermost level.
  const int64_t inner = Strided ? l.rows.size[l.rows.levels - 1] : l.rows.count;
  const int64_t tiles_inner = (inner + kP - 1) / kP;
  parallel_pieces(l.rows.count / inner * tiles_inner, cost * kP, [&](Pieces& pieces) {
    const std::unique_ptr<A[]> scratch(new A[static_cast<size_t>(l.classes) * kP * planes]());
    auto take = worker(scratch.get());
    auto tile_at = [&](int64_t i) {
      const int64_t first = i / tiles_inner * inner + i % tiles_inner * kP;
      typename Rows<4>::Walk at(l.rows, first);
      Positions<T, P> tile{static_cast<int>(std::min<int64_t>(kP, inner - i % tiles_inner * kP)),
                           {},
                           {x + (Strided ? at.offset[1] : 0), l.x_step, {}},
                           {t + (Strided ? at.offset[3] : 0), l.t_step, {}},
                           {out + (Strided ? at.offset[0] : 0), l.out_step, {}}};
      for (int p = 0; p < tile.count; ++p) {
        tile.out.offset[p] = at.offset[0], tile.x.offset[p] = at.offset[1];
        tile.row[p] = at.offset[2], tile.t.offset[p] = at.offset[3];
        if (p + 1 < tile.count) at.next();
      }
      take(tile);
    };
    pieces.each([&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) tile_at(i);
    });
  });
}

}  // namespace fusedtricks::FT_ISA
