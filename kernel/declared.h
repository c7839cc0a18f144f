// Written by kernel/declared.py from the declarations in src/cellstack/cells: change those instead.
// clang-format off
#pragma once

// struct, name, gates, slots, in_rows, states, recurrent, drops, resets, normed, saved: see kinds.h
#define CELLSTACK_KINDS(KIND) \
    KIND(Lstm, "lstm", 4, "sstst", {0, 1, 2, 3}, 2, true, false, false, 0, 0) \
    KIND(Gru, "gru", 3, "sst", {1, 0, 2}, 1, true, false, true, 2, 0) \
    KIND(SimpleRnn, "rnn", 1, "t", {0}, 1, true, false, false, 0, 0) \
    KIND(MinGru, "mingru", 2, "s-", {0, 1}, 1, false, false, false, 0, 0) \
    KIND(MinLstm, "minlstm", 3, "ss-", {0, 1, 2}, 1, false, false, false, 0, 0) \
    KIND(LiGru, "ligru", 2, "s-", {0, 1}, 1, true, true, false, 0, 0) \
    KIND(Slstm, "slstm", 4, "--ts", {0, 1, 2, 3}, 4, true, false, false, 0, 1) \
    KIND(CfC, "cfc", 4, "tt-s", {0, 1, 2, 3}, 1, true, false, false, 0, 0) \
    KIND(Sru, "sru", 4, "-ss--", {0, 1, 2, 3}, 2, false, false, false, 0, 0) \
    KIND(CfS, "cfs", 1, "-", {0}, 1, true, false, false, 0, 0)

// name, form, numbers, sums: see description.h
#define CELLSTACK_ARRAYS(ARRAY) \
    ARRAY(kernel, kMatrix, d.multiplied() * d.sum_gates() * d.sum_units(), 0) \
    ARRAY(recurrent_kernel, kMatrix, d.heads * (d.output / d.heads) * d.sum_gates() * d.sum_units() / d.heads, 0) \
    ARRAY(bias, kBias, (1 + d.two_biases()) * d.sum_gates() * d.sum_units(), 2 * kMostGates) \
    ARRAY(peepholes, kVectors, (d.gates() - 1) * d.units, kMostGates - 1) \
    ARRAY(projection, kMatrix, d.units * d.output, 0) \
    ARRAY(kernel_gain, kVectors, d.sum_gates() * d.sum_units(), kMostGates) \
    ARRAY(recurrent_gain, kVectors, d.sum_gates() * d.sum_units(), kMostGates) \
    ARRAY(cell_gain, kVectors, d.units, 1) \
    ARRAY(cell_bias, kVectors, d.units, 1) \
    ARRAY(gate_kernel, kMatrix, d.backbone_units * d.gates() * d.units, 0) \
    ARRAY(gate_bias, kBias, d.gates() * d.units, 0) \
    ARRAY(backbone_kernel, kMatrix, d.more_layers() * d.backbone_units * d.backbone_units, 0) \
    ARRAY(backbone_bias, kBias, d.more_layers() * d.backbone_units, 0) \
    ARRAY(cell_vectors, kVectors, 2 * d.units, 2) \
    ARRAY(decay, kVectors, d.units, 1) \
    ARRAY(limit, kVectors, d.units, 1)

// type, name, default: settings of CellSpec; None is an infinity, a text its place in its options
#define CELLSTACK_FLAGS(FLAG) \
    FLAG(bool, use_bias, true) \
    FLAG(bool, peepholes, false) \
    FLAG(bool, coupled, false) \
    FLAG(int64_t, proj_size, 0) \
    FLAG(double, cell_clip, __builtin_inf()) \
    FLAG(double, zoneout_cell, 0.0) \
    FLAG(int, layer_norm, false) \
    FLAG(int64_t, heads, 1) \
    FLAG(bool, use_kernel, true) \
    FLAG(double, norm_epsilon, 1e-05) \
    FLAG(double, clip, __builtin_inf()) \
    FLAG(double, zoneout, 0.0) \
    FLAG(bool, learn_initial_state, false) \
    FLAG(bool, reset_after, true) \
    FLAG(bool, exponential_forget, false) \
    FLAG(int, mode, 0) \
    FLAG(int64_t, backbone_units, 0) \
    FLAG(int64_t, backbone_layers, 1) \
    FLAG(bool, scalar, false)
