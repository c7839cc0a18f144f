"""How far two answers may lie apart, each with the reason. Planted mutants must exceed these (test_layers_mutants)."""

KERAS = 1e-5  # relative to the greatest entry above 1; float32 on both sides, sums in another order, a few steps
KERAS_DOUBLE = 2e-7  # the same in float64: masks and hard_sigmoid of Keras round to float32 (3e-8 over these steps)
REFERENCE = 2e-6  # float32 against the float64 reference: rounding does not grow over 1,000 steps of a stable cell
REFERENCE_GRADIENT = 2e-5  # relative to the greatest entry; float32 sums over steps and rows
REFERENCE_DOUBLE = 1e-12  # float64 against float64: another order of summation, vector exp and tanh within a few ulp
LOOP = 2e-6  # the fused kernel against the torch loop, both in float32
SHARDED = 1e-6  # gradients averaged over two processes against those of one: another order of summation
EXACT = 0.0  # linear mode: identity activations and small integers make float32 arithmetic exact
NETWORK = 5e-6  # float32 against float64, relative to the greatest output, through up to five nodes
DIFFERENCE = 1e-3  # central differences of step 1e-3 in float32: an output's rounding (1e-7) over the step, times ten
BFLOAT16 = 2e-2  # what rounding a layer's input to 8 bits moves its output by, a few units of 2^-8
KERNEL = {"float32": 2e-5, "float64": 1e-12}  # the kernel against the reference, relative to the greatest entry above 1
KERNEL_GRADIENT = 10  # times that: sums over all steps and rows, of random gradients into all five results
KERNEL_ACTIVATIONS = 1e-11  # float64, any pair of activations: values grow without bound under some
