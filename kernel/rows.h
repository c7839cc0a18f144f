// The routines of every kind of cell, in tables. The loops over steps and rows exist once for all kinds, and call what
// a kind computes through a pointer.
#pragma once
#include "declared_rows.h"

namespace cellstack {
namespace {

// The routines of a kind that cells.h describes, forward for all rows at time t; those of a reset gate that acts before
// the product are null in kinds without one.
template <class T>
struct ForwardRoutines {
    void (*rows)(const Forward<T>& f, int64_t t, T* z, T* q, int64_t stride);
    void (*reset)(const Forward<T>& f, int64_t t, T* z, int64_t stride);
};
template <class T>
struct BackwardRoutines {
    void (*row)(const Backward<T>& f, const Limits<T>& limits, int64_t r, int64_t n, int64_t columns,
                int64_t unit_columns);
    void (*reset)(const Backward<T>& f, const Limits<T>& limits, int64_t r, int64_t n, int64_t columns,
                  int64_t unit_columns);
};

template <class T>
INLINE bool is_used(const Forward<T>& f, int64_t r, int64_t t) {
    return !f.mask || f.mask[r * f.steps + t];
}

template <class T, class Cell, bool Usual>
void all_rows(const Forward<T>& f, int64_t t, T* z, T* q, int64_t stride) {
    const int64_t row = f.w.d->gates() * stride;
    const T* h = f.h;
    T* h_next = f.h_next;
    for (int64_t r = 0; r < f.rows; ++r, z += row, q += row)
        if (is_used(f, r, t))
            Cell::template row<T, Usual>(f, r, t, z, q, stride, h, h_next);
        else
            carry(f, r, t, h, h_next);
}
template <class T, class Cell, bool Usual>
void reset_rows(const Forward<T>& f, int64_t t, T* z, int64_t stride) {
    const int64_t row = f.w.d->gates() * stride;
    for (int64_t r = 0; r < f.rows; ++r, z += row)
        Cell::template reset<T, Usual>(f, r, t, z, stride, f.h, is_used(f, r, t));
}

template <class T, class Cell, bool Usual, bool Resets>
constexpr ForwardRoutines<T> forward_of() {
    if constexpr (Resets)
        return {all_rows<T, Cell, Usual>, reset_rows<T, Cell, Usual>};
    else
        return {all_rows<T, Cell, Usual>, nullptr};
}
template <class T, class Cell, bool Usual, bool Resets>
constexpr BackwardRoutines<T> backward_of() {
    if constexpr (Resets)
        return {Cell::template row_back<T, Usual>, Cell::template reset_back<T, Usual>};
    else
        return {Cell::template row_back<T, Usual>, nullptr};
}

template <class T, bool Usual>
constexpr ForwardRoutines<T> kForward[] = {
#define CELLSTACK_KIND(rows, ...) forward_of<T, rows, Usual, kKinds[k##rows].resets>(),
    CELLSTACK_KINDS(CELLSTACK_KIND)
#undef CELLSTACK_KIND
};
template <class T, bool Usual>
constexpr BackwardRoutines<T> kBackward[] = {
#define CELLSTACK_KIND(rows, ...) backward_of<T, rows, Usual, kKinds[k##rows].resets>(),
    CELLSTACK_KINDS(CELLSTACK_KIND)
#undef CELLSTACK_KIND
};

// Those for the default activations (`usual`) or for any; in float64 there is only the copy for any.
template <class T>
INLINE const ForwardRoutines<T>& forward_routines(const Kind* kind, bool usual) {
    return (usual ? kForward<T, kInlined<T>> : kForward<T, false>)[kind - kKinds];
}
template <class T>
INLINE const BackwardRoutines<T>& backward_routines(const Kind* kind, bool usual) {
    return (usual ? kBackward<T, kInlined<T>> : kBackward<T, false>)[kind - kKinds];
}

}  // namespace
}  // namespace cellstack
