"""Training on a text: cellstack's character model in its fit loop, compared with the same in plain torch.

    python benchmarks/text.py [BOOK.txt] [--steps 40] [--seeds 5] [--threads 1]

Two layers of 256 units, streams of 128 characters per step, Adam at 2e-3, gradients clipped to a norm of 1. Both start
with the same weights, see the same batches, and carry their state from one batch to the next; their outputs on the
first batch are compared before timing. torch's model is nn.Embedding, nn.LSTM and nn.Linear in a typical loop. The two
train in turn, seed by seed; times are from batch to batch, including the whole loop: the minimum, the median, and the
median of processor time, which is the relevant one if other programs run. A ratio is torch's time divided by
cellstack's. Bits per character are those of the validation part, after the same number of steps.
"""

import argparse
import math
import time
from functools import partial
from importlib.resources import files

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from cellstack.train.loop import learn
from cellstack.train.options import Architecture, FitOptions
from cellstack.train.text.data import Text, TextParts, content, measured
from cellstack.train.text.model import Chunks, TextModel
from cellstack.train.text.workflow import adam

LR, CLIP = 2e-3, 1.0


class Timed(Chunks):
    """Records when a batch is requested."""

    def epoch(self, number, first=0):
        self.asked = [(time.perf_counter(), time.process_time())]
        for batch in super().epoch(number, first):
            yield batch
            self.asked.append((time.perf_counter(), time.process_time()))

    def step(self):
        """Return the minimum and the median milliseconds per step, and the median processor time."""
        took, worked = np.diff(self.asked, axis=0)[2:].T * 1e3  # the first ones are warm-up
        return took.min(), np.median(took), np.median(worked)


class Plain(nn.Module):
    """The same model from torch's own modules, with cellstack's weights."""

    def __init__(self, ours):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(ours.embedding.weight.detach().clone(), freeze=False)
        units = ours.recurrent[0].cell.units
        self.lstm = nn.LSTM(self.embedding.embedding_dim, units, len(ours.recurrent), batch_first=True)
        self.head = nn.Linear(units, ours.size)
        self.head.load_state_dict(ours.head.state_dict())
        with torch.no_grad():
            for n, layer in enumerate(ours.recurrent):
                kernel, recurrent, bias = (weight.detach() for weight in layer.cell.parameters())
                getattr(self.lstm, f"weight_ih_l{n}").copy_(kernel.T)
                getattr(self.lstm, f"weight_hh_l{n}").copy_(recurrent.T)
                getattr(self.lstm, f"bias_ih_l{n}").copy_(bias)
                getattr(self.lstm, f"bias_hh_l{n}").zero_()

    def forward(self, x, state=None):
        y, state = self.lstm(self.embedding(x), state)
        return self.head(y), state


def train_plain(model, chunks):
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    state = None
    for batch in chunks.epoch(0):
        x, y = torch.from_numpy(batch.x), torch.from_numpy(batch.y)
        out, state = model(x, state)
        loss = functional.cross_entropy(out.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        state = tuple(part.detach() for part in state)


@torch.no_grad()
def bits(model, chunks):
    total, count, state = 0.0, 0, None
    for x, y, counts in measured(chunks.text.ids, chunks.parts.validation):
        out, state = model(torch.from_numpy(x), state)
        nats = functional.cross_entropy(out.flatten(0, 1), torch.from_numpy(y).flatten(), reduction="none").numpy()
        total, count = total + float(nats[counts.ravel()].sum(dtype=np.float64)), count + int(counts.sum())
    return total / count / math.log(2.0)


def carrying(model):
    def run(x, state):
        model.carried = state
        out = model(x)
        return out, model.carried

    return run


def shown(figures, digits):
    return " / ".join(f"{figure:.{digits}f}" for figure in figures)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("book", nargs="?", default=str(files("cellstack_demo") / "data" / "alice.txt"))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    text = Text.of(content(args.book), args.book)
    parts = text.parts()
    # The number of characters for this many steps, in parallel streams of the training part.
    most = min(parts.training[1], args.steps * args.batch * args.chunk + 1)
    chunks = Timed(text, TextParts((0, most), parts.validation, parts.test), args.batch, args.chunk)
    print(
        f"{text.summary(parts)}; {chunks.steps} steps of {chunks.streams.rows} x {args.chunk}, {args.threads} threads"
    )
    chunks.validates = False  # validated at the end, in the same way for both
    ratios = []
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        ours = TextModel(text.alphabet.size, Architecture((256, 256), dropout=0.0))
        plain = Plain(ours)
        x = torch.from_numpy(chunks.streams.chunk(0)[0])
        torch.testing.assert_close(ours(x), plain(x)[0], atol=2e-5, rtol=1e-4)
        took = {}
        options = FitOptions(epochs=1, lr=LR, clip=CLIP, seed=seed, threads=args.threads, optimizer=adam(LR))
        runs = {
            "cellstack": partial(learn, ours, chunks, options),
            "torch": partial(train_plain, plain, chunks),
        }
        for name, run in sorted(runs.items(), reverse=bool(seed % 2)):
            run()
            took[name] = chunks.step()
        ours.eval()
        found = bits(carrying(ours), chunks), bits(plain, chunks)
        ratios.append([theirs / mine for mine, theirs in zip(took["cellstack"], took["torch"], strict=True)])
        times = [f"{name} {shown(figures, 1)} ms per step" for name, figures in took.items()]
        print(
            f"seed {seed}: {', '.join(sorted(times))}, ratio {shown(ratios[-1], 2)}; "
            f"bits per character {found[0]:.3f}, torch {found[1]:.3f}",
            flush=True,
        )
    print(f"medians of the ratios {shown(np.median(ratios, axis=0), 2)}")


if __name__ == "__main__":
    main()
