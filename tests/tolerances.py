"""Tolerances of comparisons, each with a reason. Planted mutants must exceed them (test_layers_mutants)."""

KERAS = 1e-5  # relative to the largest entry above 1; float32 on both sides, different summation order, a few steps
KERAS_DOUBLE = 2e-7  # the same in float64: masks and hard_sigmoid of Keras round to float32 (3e-8 over these steps)
REFERENCE = 2e-6  # float32 and the float64 reference: rounding errors don't grow over 1,000 steps of a stable cell
REFERENCE_GRADIENT = 2e-5  # relative to the largest entry; float32 sums over steps and rows
REFERENCE_DOUBLE = 1e-12  # float64 on both sides: different summation order, vector exp and tanh within a few ulp
LOOP = 2e-6  # the fused kernel and the torch loop, both in float32
SHARDED = 1e-6  # gradients averaged over two processes and those of one process: different summation order
EXACT = 0.0  # linear mode: identity activations and small integers make float32 arithmetic exact
NETWORK = 5e-6  # float32 and float64, relative to the largest output, through up to five nodes
TIREX = 5e-5  # float32 on both sides, relative to the largest value, through three blocks with random weights
DIFFERENCE = 1e-3  # central differences of step 1e-3 in float32: an output's rounding (1e-7) over the step, times ten
BFLOAT16 = 2e-2  # the effect of rounding a layer's input to 8 bits on its output, a few units of 2^-8
KERNEL = {"float32": 2e-5, "float64": 1e-12}  # the kernel and the reference, relative to the largest entry above 1
KERNEL_GRADIENT = 10  # factor of KERNEL: sums over all steps and rows, of random gradients into all five results
KERNEL_ACTIVATIONS = 1e-11  # float64, any pair of activations: with some, values grow without bound
