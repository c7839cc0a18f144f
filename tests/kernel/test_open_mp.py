"""Kernel tasks on PyTorch's threads. Each test runs in a forked process without threads, so that it can count them."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")

BEGIN = """
import os
import signal
import numpy as np
import torch
from cellstack import Network
from cellstack.nodes import Cell, Recurrent
from cellstack.cells.spec import CellSpec

rng = np.random.default_rng(0)
arrays = [rng.normal(scale=0.1, size=shape).astype(np.float32) for shape in ((64, 32), (8, 32), (32,))]
net = Network([Recurrent([Cell(CellSpec(64, 8), *arrays)])])
x = rng.normal(size=(256, 40, 64)).astype(np.float32)
torch.set_num_threads(2)

def threads():
    return len(os.listdir("/proc/self/task"))

def used():
    '''Wake PyTorch's threads, and return how many there are.'''
    a = torch.ones(500, 500)
    a @ a
    return threads()

alone = net.run(x, threads=1)[0]

import json
import sys

for line in sys.stdin:  # a script, run in a child
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        exec(json.loads(line))
        sys.stdout.flush()
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def output_of():
    """Return a function that runs a script after BEGIN, and returns the words that it prints."""
    command = [sys.executable, "-W", "ignore", "-c", BEGIN]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def ask(script):
            print(json.dumps(script), file=process.stdin, flush=True)
            words = process.stdout.readline().split()
            assert process.stdout.readline() == "0\n", "the script failed"
            return words

        yield ask
        process.stdin.close()


@pytest.mark.long
def test_the_kernel_uses_the_threads_of_pytorch(output_of):
    created = []
    for _ in range(100):  # PyTorch's threads count as asleep while other processes run on their processors
        same, before, after = output_of("""
before = used()
y = net.run(x, threads=2)[0]  # one parallel call: there is one block of units, so threads share the rows
print(np.array_equal(y, alone), before, threads())
""")
        assert same == "True"
        created.append(int(after) - int(before))
        if not created[-1]:
            break
    assert created[-1] == 0


@pytest.mark.long
def test_the_kernel_creates_threads_if_pytorch_is_limited_to_one(output_of):
    same, before, after = output_of("""
torch.set_num_threads(1)
before = used()
y = net.run(x, threads=2)[0]
print(np.array_equal(y, alone), before, threads())
""")
    assert same == "True"
    assert int(after) == int(before) + 1


def test_the_kernel_creates_threads_while_those_of_pytorch_sleep(output_of):
    same, before, after = output_of("""
import time
before = used()
net.run(x, threads=2)
for _ in range(100):  # until they sleep
    time.sleep(0.1)
    y = net.run(x, threads=2)[0]
    if threads() > before:
        break
print(np.array_equal(y, alone), before, threads())
""")
    assert same == "True"
    assert int(after) == int(before) + 1


def test_a_forked_child_leaves_the_threads_of_its_parent_alone(output_of):
    assert output_of("""
used()
net.run(x, threads=2)
child = os.fork()
if child == 0:
    signal.alarm(30)  # ends the child if it waits for threads that it doesn't have
    os._exit(0 if np.array_equal(net.run(x, threads=2)[0], alone) else 1)
print(os.waitpid(child, 0)[1])
""") == ["0"]


@pytest.mark.long
def test_callers_in_several_threads_of_python(output_of):
    assert output_of("""
from concurrent.futures import ThreadPoolExecutor

def run(_):
    used()
    return all(np.array_equal(net.run(x, threads=2)[0], alone) for _ in range(20))

with ThreadPoolExecutor(4) as pool:
    print(all(pool.map(run, range(8))))
""") == ["True"]
