// Cross-entropy on the CPU: what rows and tiles share, and rows whose classes lie side by side.
//
// A row is read from memory once: maximum, sum and gradient find it in the caches. Bytes that must move, for n elements
// of s bytes: forward ns, backward 2ns, both in one pass 2ns; for class probabilities ns more each way.
#pragma once

#include "math/cross_entropy.h"
#include "parallel.h"
#include "vec_math.h"

namespace fusedtricks::FT_ISA {

// Plain: z = x, and no class weights.
template <class A, bool Plain>
struct Scaling {
  A softcap, scale;

  struct Tanh {
    Vec<A> operator()(Vec<A> x) const { return tanh<A>(x); }
  };

  Vec<A> operator()(Vec<A> x) const {
    if constexpr (Plain) return x;
    return scaled_logit(x, softcap, scale, Tanh{});
  }

  A operator()(A x) const { return (*this)(broadcast(x))[0]; }

  // dz / dx
  Vec<A> slope(Vec<A> x) const { return scaled_slope(x, softcap, scale, Tanh{}); }
};

// Everything about a call that does not change from row to row.
template <class T, class P, bool Plain>
struct Loss {
  using A = Acc<T>;
  LossOptions<A> o;
  Scaling<A, Plain> z;
  int64_t classes;
  const A* weight;  // (C,) or null

  Vec<A> weights(int64_t j, auto lanes) const {
    if constexpr (Plain) return broadcast(A(1));
    return weight ? load(weight + j, lanes) : broadcast(A(1));
  }
  A weight_at(int64_t c) const {
    if constexpr (Plain) return A(1);
    return weight ? weight[c] : A(1);
  }
  // q of class probabilities
  Vec<A> q(Vec<A> t, Vec<A> w) const { return soft_coefficient(t, w, o); }
};

// Gradients of so many bytes are streamed past the caches. Smaller ones, though worth_streaming, serve as memory for
// the exponentials of their rows.
inline bool goes_far(int64_t bytes) { return bytes > int64_t{32} << 20; }

// ---- one row --------------------------------------------------------------------------------------------------------

// max z of a row; NaN is passed over, and shows in the sum.
template <class T, class P, bool Plain, class A = Acc<T>>
inline A row_top(const Loss<T, P, Plain>& loss, const T* x) {
  constexpr A kNone = -std::numeric_limits<A>::infinity();
  Vec<A> top[4] = {broadcast(kNone), broadcast(kNone), broadcast(kNone), broadcast(kNone)};
  sweep<A, 4>(0, loss.classes, [&](int64_t j, auto lanes, int k) __attribute__((always_inline)) {
    top[k] = larger<A>(keep_or<A>(load(x + j, lanes), lanes, kNone), top[k]);
  });
  const A most = max_lanes<A>(larger<A>(larger<A>(top[0], top[1]), larger<A>(top[2], top[3])));
  return loss.z(most);
}

// sums: exp(z - top); w (z - top), or q (z - top); q. With Keep, exp(z - top) goes to `kept`. Meanwhile the row that is
// next, at `next`, travels to the caches: this is where the arithmetic takes its time. So does what `before` stores: it
// is told j before anything at or beyond kept + j is overwritten.
template <bool Keep, bool Probabilities, class T, class P, bool Plain, class Before, class A = Acc<T>>
inline void row_sums(const Loss<T, P, Plain>& loss, const T* x, const P* t, A top, A* kept, const T* next,
                     const Before& before, A (&sums)[3]) {
  reduce<A, 4>(loss.classes, sums, [&](int64_t j, auto lanes, Vec<A>* s) __attribute__((always_inline)) {
    __builtin_prefetch(next + j, 0, 2);
    before(j);
    const Vec<A> centred = loss.z(load(x + j, lanes)) - top;
    const Vec<A> e = exp<A>(centred);
    if constexpr (Keep) store(kept + j, e, lanes);
    s[0] += keep<A>(e, lanes);
    if constexpr (Probabilities) {
      const Vec<A> q = keep<A>(loss.q(load(t + j, lanes), loss.weights(j, lanes)), lanes);
      s[1] += q != A(0) ? q * centred : Vec<A>{};
      s[2] += q;
    } else if constexpr (Plain) {
      s[1] += keep<A>(centred, lanes);
    } else {
      const Vec<A> w = keep<A>(loss.weights(j, lanes), lanes);
      s[1] += w != A(0) ? w * centred : Vec<A>{};
    }
  });
}

// The gradient of a row, dx = slope.softmax softmax - g q, from e(j, lanes) = exp(z - top). x and dx may be one memory.
// It is open() first, then stored, as a whole or register by register, then closed.
template <bool Probabilities, class T, class P, bool Plain, class A = Acc<T>>
struct RowGradient {
  const Loss<T, P, Plain>& loss;
  const T* x;
  const P* t;
  T* dx;
  RowTarget<A> target;
  RowSlope<A> slope;
  A k, off, at_a, at_b;
  int64_t head;  // What is streamed is stored from where it is aligned.

  // `unit` is 1 / sum e.
  template <bool Stream, class E>
  void open(const T* x_, const P* t_, T* dx_, const RowTarget<A>& target_, const RowSlope<A>& slope_, A unit,
            const E& e) {
    x = x_, t = t_, dx = dx_, target = target_, slope = slope_;
    k = slope.softmax * unit, off = slope.g * target.off;
    // At the labels, before anything is overwritten.
    auto at = [&](int64_t c) {
      A value = k * e(c, Tail{1})[0] - off * loss.weight_at(c);
      if (c == target.a) value -= slope.g * target.at_a;
      if (c == target.b) value -= slope.g * target.at_b;
      if constexpr (!Plain) value *= loss.z.slope(load(x + c, Tail{1}))[0];
      return value;
    };
    at_a = Probabilities ? A(0) : at(target.a), at_b = Probabilities ? A(0) : at(target.b);
    head = 0;
    if constexpr (Stream) {
      head = unaligned_head(dx);
      if (head > 0) put<Stream>(0, Tail{static_cast<int>(head)}, e);
    }
  }

  template <bool Stream, class E>
  __attribute__((always_inline)) void put(int64_t j, auto lanes, const E& e) const {
    Vec<A> value = k * e(j, lanes);
    if constexpr (Probabilities) {
      value -= slope.g * loss.q(load(t + j, lanes), loss.weights(j, lanes));
    } else {
      value -= off * loss.weights(j, lanes);
    }
    if constexpr (!Plain) value *= loss.z.slope(load(x + j, lanes));
    store_or_stream<Stream>(dx + j, value, lanes);
  }

  void close() const {
    if constexpr (Probabilities) return;
    dx[target.a] = rounded_to<T>(at_a);
    dx[target.b] = rounded_to<T>(at_b);
  }

  template <bool Stream, class E>
  void store(const E& e) const {
    sweep<A, 4>(head, loss.classes,
                [&](int64_t j, auto lanes, int) __attribute__((always_inline)) { put<Stream>(j, lanes, e); });
    close();
  }
};

// How many classes come before `label`, ties in order of the classes.
template <class T, class A = Acc<T>>
inline int32_t row_rank(const T* x, int64_t classes, int64_t label) {
  const A mine = load(x + label, Tail{1})[0];
  if (mine != mine) return static_cast<int32_t>(classes);
  int64_t rank = 0;
  Vec<IntOf<A>> count{};
  // Chunks that begin and end with the label, so that ties before and behind it differ by a comparison.
  sweep<A, 1>(0, label, [&](int64_t j, auto lanes, int) {
    count -= keep_or<A>(load(x + j, lanes), lanes, -std::numeric_limits<A>::infinity()) >= mine;
    if constexpr (!std::is_same_v<decltype(lanes), Full>) {
      if (!(mine > -std::numeric_limits<A>::infinity())) rank -= kLanes<A> - lanes.n;
    }
  });
  sweep<A, 1>(label + 1, classes, [&](int64_t j, auto lanes, int) {
    count -= keep_or<A>(load(x + j, lanes), lanes, -std::numeric_limits<A>::infinity()) > mine;
  });
  for (int i = 0; i < kLanes<A>; ++i) rank += count[i];
  return static_cast<int32_t>(rank);
}

}  // namespace fusedtricks::FT_ISA
