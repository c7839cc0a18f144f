"""The cost of inspecting training: epochs with and without a `TrainingMonitor`, one thread, weights compared first.

Seconds are processor time, which other work on the machine affects less.
"""

import statistics
import time

import torch

import cellstack as cs

SIZES = [(16, 20, 48, 2), (32, 100, 64, 1), (32, 100, 128, 2), (64, 400, 128, 1), (16, 2000, 128, 1)]  # B, T, H, layers
WIDTH, ROUNDS = 16, 5


def model_of(units, count):
    torch.manual_seed(0)
    stack = [
        cs.layers.LSTM(units, return_sequences=n < count - 1, input_size=units if n else WIDTH) for n in range(count)
    ]
    model = torch.nn.Sequential(*stack, torch.nn.Linear(units, 1))
    return model, torch.optim.Adam(model.parameters())


def step(model, optimizer, x, y):
    started = time.process_time()
    optimizer.zero_grad()
    torch.nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    return time.process_time() - started


def main():
    torch.set_num_threads(1)
    print(f"{'B, T, H, layers':<18} {'a step':>9} {'inspected step':>18} {'epoch()':>9}   of 100 steps")
    for batch, steps, units, count in SIZES:
        x, y = torch.randn(batch, steps, WIDTH), torch.randn(batch, 1)
        (plain, adam), (looked, adam_too) = model_of(units, count), model_of(units, count)
        taken = {"plain": [], "looked": [], "epoch": []}
        with cs.inspect.TrainingMonitor(looked) as monitor:
            for _ in range(ROUNDS):
                taken["plain"].append(step(plain, adam, x, y))
                taken["looked"].append(step(looked, adam_too, x, y))
                started = time.process_time()
                monitor.epoch()
                taken["epoch"].append(time.process_time() - started)
        assert all(map(torch.equal, plain.state_dict().values(), looked.state_dict().values()))
        own, seen, end = (1e3 * statistics.median(times[1:]) for times in taken.values())
        share = max(seen - own, 0.0) + end
        size = f"{batch}, {steps}, {units}, {count}"
        print(f"{size:<18} {own:>6.1f} ms {seen:>15.1f} ms {end:>6.1f} ms   {share / (100 * own):>6.1%}")


if __name__ == "__main__":
    main()
