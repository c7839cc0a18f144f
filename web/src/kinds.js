// The kinds of cell, written by web/write_kinds.py from their declarations in Python: change those instead.

// Of each kind: the gates in the order of their blocks; its states; the names in a trace; for each slot of
// an activation, in the kernel's order, the setting that names it; its arrays, each with the symbols of its
// axes and the settings that it needs; the setting with which the last column of x is a number of the step;
// and the settings with their defaults.
export const KINDS = {
  lstm: {
    gates: ["i", "f", "g", "o"],
    states: ["h", "c"],
    trace: ["i", "f", "g", "o", "c", "h"],
    slots: {"i": "recurrent_activation", "f": "recurrent_activation", "g": "activation", "o": "recurrent_activation", "cell": "activation"},
    arrays: [["kernel", "I S", "use_kernel"], ["recurrent_kernel", "heads P/heads S/heads", ""], ["bias", "biases S", "use_bias"], ["peepholes", "G-1 H", "peepholes"], ["projection", "H P", "proj_size"], ["kernel_gain", "S", "layer_norm"], ["recurrent_gain", "S", "layer_norm and not joint"], ["cell_gain", "H", "layer_norm"], ["cell_bias", "H", "layer_norm"], ["initial_h", "P", "learn_initial_state"], ["initial_c", "H", "learn_initial_state"]],
    scalar: "",
    settings: {"activation": "tanh", "recurrent_activation": "sigmoid", "use_bias": true, "peepholes": false, "coupled": false, "proj_size": 0, "cell_clip": null, "zoneout_cell": 0.0, "gate_activations": {}, "layer_norm": false, "heads": 1, "use_kernel": true, "norm_epsilon": 1e-05, "clip": null, "zoneout": 0.0, "learn_initial_state": false},
  },
  gru: {
    gates: ["z", "r", "g"],
    states: ["h"],
    trace: ["z", "r", "g", "h"],
    slots: {"z": "recurrent_activation", "r": "recurrent_activation", "g": "activation"},
    arrays: [["kernel", "I S", "use_kernel"], ["recurrent_kernel", "heads P/heads S/heads", ""], ["bias", "biases S", "use_bias"], ["kernel_gain", "S", "layer_norm"], ["recurrent_gain", "S", "layer_norm and not joint"], ["initial_h", "P", "learn_initial_state"]],
    scalar: "attention",
    settings: {"activation": "tanh", "recurrent_activation": "sigmoid", "use_bias": true, "reset_after": true, "attention": false, "gate_activations": {}, "layer_norm": false, "heads": 1, "use_kernel": true, "norm_epsilon": 1e-05, "clip": null, "zoneout": 0.0, "learn_initial_state": false},
  },
  rnn: {
    gates: ["g"],
    states: ["h"],
    trace: ["g", "h"],
    slots: {"g": "activation"},
    arrays: [["kernel", "I S", "use_kernel"], ["recurrent_kernel", "heads P/heads S/heads", ""], ["bias", "biases S", "use_bias"], ["kernel_gain", "S", "layer_norm"], ["recurrent_gain", "S", "layer_norm and not joint"], ["initial_h", "P", "learn_initial_state"]],
    scalar: "",
    settings: {"activation": "tanh", "use_bias": true, "gate_activations": {}, "layer_norm": false, "heads": 1, "use_kernel": true, "norm_epsilon": 1e-05, "clip": null, "zoneout": 0.0, "learn_initial_state": false},
  },
  mingru: {
    gates: ["z", "g"],
    states: ["h"],
    trace: ["z", "g", "h"],
    slots: {"z": "recurrent_activation", "g": "activation"},
    arrays: [["kernel", "I S", "use_kernel"], ["bias", "biases S", "use_bias"], ["kernel_gain", "S", "layer_norm"], ["initial_h", "P", "learn_initial_state"]],
    scalar: "",
    settings: {"activation": "positive", "recurrent_activation": "sigmoid", "use_bias": true, "gate_activations": {}, "layer_norm": false, "use_kernel": true, "norm_epsilon": 1e-05, "clip": null, "zoneout": 0.0, "learn_initial_state": false},
  },
  minlstm: {
    gates: ["i", "f", "g"],
    states: ["h"],
    trace: ["i", "f", "g", "h"],
    slots: {"i": "recurrent_activation", "f": "recurrent_activation", "g": "activation"},
    arrays: [["kernel", "I S", "use_kernel"], ["bias", "biases S", "use_bias"], ["kernel_gain", "S", "layer_norm"], ["initial_h", "P", "learn_initial_state"]],
    scalar: "",
    settings: {"activation": "positive", "recurrent_activation": "sigmoid", "use_bias": true, "gate_activations": {}, "layer_norm": false, "use_kernel": true, "norm_epsilon": 1e-05, "clip": null, "zoneout": 0.0, "learn_initial_state": false},
  },
  ligru: {
    gates: ["z", "g"],
    states: ["h"],
    trace: ["z", "g", "h"],
    slots: {"z": "recurrent_activation", "g": "activation"},
    arrays: [["kernel", "I S", "use_kernel"], ["recurrent_kernel", "heads P/heads S/heads", ""], ["bias", "biases S", "use_bias"], ["kernel_gain", "S", "layer_norm"], ["recurrent_gain", "S", "layer_norm and not joint"], ["initial_h", "P", "learn_initial_state"]],
    scalar: "",
    settings: {"activation": "relu", "recurrent_activation": "sigmoid", "use_bias": true, "gate_activations": {}, "layer_norm": false, "heads": 1, "use_kernel": true, "norm_epsilon": 1e-05, "clip": null, "zoneout": 0.0, "learn_initial_state": false},
  },
  slstm: {
    gates: ["i", "f", "g", "o"],
    states: ["h", "c", "n", "m"],
    trace: ["i", "f", "g", "o", "c", "n", "m", "h"],
    slots: {"i": "recurrent_activation", "f": "recurrent_activation", "g": "activation", "o": "recurrent_activation"},
    arrays: [["kernel", "I S", "use_kernel"], ["recurrent_kernel", "heads P/heads S/heads", ""], ["bias", "biases S", "use_bias"]],
    scalar: "",
    settings: {"activation": "tanh", "recurrent_activation": "sigmoid", "use_bias": true, "exponential_forget": false, "gate_activations": {}, "heads": 1, "use_kernel": true, "zoneout": 0.0},
  },
  cfc: {
    gates: ["g", "k", "s", "t"],
    states: ["h"],
    trace: ["g", "k", "s", "t", "h"],
    slots: {"g": "activation", "k": "activation", "s": "recurrent_activation", "t": "recurrent_activation"},
    arrays: [["kernel", "I S", "use_kernel"], ["recurrent_kernel", "heads P/heads S/heads", ""], ["bias", "biases S", "use_bias"], ["kernel_gain", "S", "layer_norm"], ["recurrent_gain", "S", "layer_norm and not joint"], ["gate_kernel", "U GH", "backbone_units"], ["gate_bias", "GH", "backbone_units and use_bias"], ["backbone_kernel", "L-1 U U", "deep"], ["backbone_bias", "L-1 U", "deep and use_bias"], ["initial_h", "P", "learn_initial_state"]],
    scalar: "timespans",
    settings: {"activation": "tanh", "recurrent_activation": "sigmoid", "use_bias": true, "timespans": false, "mode": "default", "backbone_units": 0, "backbone_activation": "scaled_tanh(1.7159, 0.666)", "backbone_layers": 1, "gate_activations": {}, "layer_norm": false, "heads": 1, "use_kernel": true, "norm_epsilon": 1e-05, "clip": null, "zoneout": 0.0, "learn_initial_state": false},
  },
  sru: {
    gates: ["g", "f", "r", "s"],
    states: ["h", "c"],
    trace: ["g", "f", "r", "s", "c", "h"],
    slots: {"g": "activation", "f": "recurrent_activation", "r": "recurrent_activation", "s": "activation", "cell": "activation"},
    arrays: [["kernel", "I S", "use_kernel"], ["bias", "biases S", "use_bias"], ["cell_vectors", "2 H", ""], ["initial_h", "P", "learn_initial_state"], ["initial_c", "H", "learn_initial_state"]],
    scalar: "",
    settings: {"activation": "linear", "recurrent_activation": "sigmoid", "use_bias": true, "gate_activations": {}, "use_kernel": true, "clip": null, "zoneout": 0.0, "learn_initial_state": false},
  },
  cfs: {
    gates: ["g"],
    states: ["h"],
    trace: ["g", "h"],
    slots: {"g": "activation"},
    arrays: [["kernel", "I S", "use_kernel"], ["recurrent_kernel", "heads P/heads S/heads", ""], ["bias", "biases S", "use_bias"], ["kernel_gain", "S", "layer_norm"], ["recurrent_gain", "S", "layer_norm and not joint"], ["gate_kernel", "U GH", "backbone_units"], ["gate_bias", "GH", "backbone_units and use_bias"], ["backbone_kernel", "L-1 U U", "deep"], ["backbone_bias", "L-1 U", "deep and use_bias"], ["decay", "H", ""], ["limit", "H", ""], ["initial_h", "P", "learn_initial_state"]],
    scalar: "timespans",
    settings: {"activation": "linear", "use_bias": true, "timespans": false, "backbone_units": 0, "backbone_activation": "scaled_tanh(1.7159, 0.666)", "backbone_layers": 1, "gate_activations": {}, "layer_norm": false, "heads": 1, "use_kernel": true, "norm_epsilon": 1e-05, "clip": null, "zoneout": 0.0, "learn_initial_state": false},
  },
};

// The settings that the kernel takes as numbers, with their defaults, and the options of texts.
export const FLAGS = [["use_bias", true, []], ["peepholes", false, []], ["coupled", false, []], ["proj_size", 0, []], ["cell_clip", null, []], ["zoneout_cell", 0.0, []], ["layer_norm", false, [true, false, "joint"]], ["heads", 1, []], ["use_kernel", true, []], ["norm_epsilon", 1e-05, []], ["clip", null, []], ["zoneout", 0.0, []], ["learn_initial_state", false, []], ["reset_after", true, []], ["exponential_forget", false, []], ["mode", "default", ["default", "no_gate"]], ["backbone_units", 0, []], ["backbone_layers", 1, []], ["scalar", false, []]];

// The kernel's codes of activations, its order of a cell's arrays, and those that are matrices.
export const ACTIVATIONS = ["sigmoid", "tanh", "linear", "relu", "hard_sigmoid", "softsign", "softplus", "elu", "affine", "leaky_relu", "thresholded_relu", "scaled_tanh", "positive", "silu", "gelu"];
export const ARRAYS = ["kernel", "recurrent_kernel", "bias", "peepholes", "projection", "kernel_gain", "recurrent_gain", "cell_gain", "cell_bias", "gate_kernel", "gate_bias", "backbone_kernel", "backbone_bias", "cell_vectors", "decay", "limit", "initial_h", "initial_c"];
export const MATRICES = ["kernel", "recurrent_kernel", "projection", "gate_kernel", "backbone_kernel"];
