"""One LSTM as a LiteRT (TensorFlow Lite) file, as the converter writes it for a Keras LSTM.

It is the fused operator, which stores its state in variables between calls.
"""

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter


def model(kernel, recurrent, bias):
    width, units = kernel.shape[0], recurrent.shape[0]
    graph, file = schema.SubGraphT(), schema.ModelT()
    graph.tensors, file.buffers = [], [schema.BufferT()]  # buffer 0 is empty

    def tensor(name, shape, content=None, variable=False):
        new = schema.TensorT()
        new.name, new.shape, new.type, new.isVariable, new.buffer = name, shape, schema.TensorType.FLOAT32, variable, 0
        if content is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(content).tobytes(), np.uint8)
            new.buffer = len(file.buffers)
            file.buffers.append(buffer)
        graph.tensors.append(new)
        return len(graph.tensors) - 1

    x, y = tensor("x", [1, 1, width]), tensor("y", [1, 1, units])
    w = [tensor(f"W{n}", [units, width], part.T) for n, part in enumerate(np.split(kernel, 4, axis=1))]
    r = [tensor(f"R{n}", [units, units], part.T) for n, part in enumerate(np.split(recurrent, 4, axis=1))]
    b = [tensor(f"b{n}", [units], part) for n, part in enumerate(np.split(bias, 4))]
    h, c = (tensor(name, [1, units], variable=True) for name in "hc")
    options = schema.UnidirectionalSequenceLSTMOptionsT()
    options.fusedActivationFunction = schema.ActivationFunctionType.TANH
    operator = schema.OperatorT()
    operator.opcodeIndex, operator.builtinOptions = 0, options
    operator.builtinOptionsType = schema.BuiltinOptions.UnidirectionalSequenceLSTMOptions
    none = -1  # no peepholes, no projection, no layer normalisation
    operator.inputs = [x, *w, *r, *[none] * 3, *b, *[none] * 2, h, c, *[none] * 4]
    operator.outputs = [y]
    graph.operators, graph.inputs, graph.outputs = [operator], [x], [y]
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.UNIDIRECTIONAL_SEQUENCE_LSTM
    file.version, file.operatorCodes, file.subgraphs = 3, [code], [graph]
    builder = flatbuffers.Builder(1024)
    builder.Finish(file.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def step(cell, x):
    interpreter = Interpreter(model_content=model(*cell), num_threads=1)
    interpreter.allocate_tensors()
    to, end = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    x = x[None]

    def run():
        interpreter.set_tensor(to, x)
        interpreter.invoke()
        return interpreter.get_tensor(end)[0]

    return run
