"""Train a character model on a book, find the units that track quotes, lines and indentation, and ablate one.

python examples/units_that_track.py [--out FOLDER] [--seeds 0 1 2] [--html] [--quick]

It prints its results, and writes units-text.png and units-ablated.png into the folder. The method is that of Karpathy,
Johnson and Li 2015, "Visualizing and Understanding Recurrent Networks", with two controls: labels that are shifted
along the text, and the untrained network. A seed takes about four minutes on one core.
"""

import argparse
import math
from collections import Counter, defaultdict
from importlib import resources
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import nn

import cellstack as cs
from cellstack import layers

WIDTH = 32  # of the embedding
LONGEST = 100  # steps: "chrono initialisation" of Tallec and Ollivier 2018, "Can recurrent neural networks warp time?"
WARM = 200  # characters that a row reads before its results count
PAGE = 1000  # characters on the page
SHIFTS = 200  # random relabellings
TINY = 1e-12  # for units that don't change
FULL = {"units": 192, "epochs": 36, "rows": 4, "steps": 200, "sampled": (32, 600), "controls": 20}
QUICK = {"units": 48, "epochs": 8, "rows": 16, "steps": 50, "sampled": (16, 150), "controls": 5}
QUOTES, COLUMN, VERSE, PARAGRAPH = "inside quotes", "position in the line", "in verse", "first line of a paragraph"
HERE, OTHERS = "#5a3a8a", "#c9b8dc"
DIALOGUE, POEM = "`Please your Majesty,' said the Knave", "They told me you had been to her"


# ── the text, and its ground truth ────────────────────────────────────────────────────────────────────────────────────


class Book:
    """The text as numbers, split into training, validation and held-out test part."""

    def __init__(self):
        self.text = (resources.files("cellstack_demo") / "data" / "alice.txt").read_text(encoding="ascii")
        self.characters = sorted(set(self.text))
        number = {character: n for n, character in enumerate(self.characters)}
        self.ids = np.array([number[character] for character in self.text])
        first, second = int(0.8 * len(self.ids)), int(0.9 * len(self.ids))
        self.train, self.choose, self.held_out = slice(0, first), slice(first, second), slice(second, None)
        self.closing = closing_quotes(self.text)

    def of(self, character):
        return self.characters.index(character)


def closing_quotes(text):
    """Distinguish closing quotes from apostrophes: no letter follows them. (All 1105 close an open one.)"""
    following = text[1:] + " "
    return np.array([mark == "'" and not after.isalpha() for mark, after in zip(text, following, strict=True)])


def inside_quotes(text, closing):
    """Return whether a quote is open after each character, `[T]`."""
    found, inside = [], False
    for character, closes in zip(text, closing, strict=True):
        inside = character == "`" or (inside and not closes)
        found.append(inside)
    return np.array(found)


def truths(text, closing):
    """Return what a unit may track, by name: the values after each character, and the characters that count."""
    column, indents, past = [], [], []
    for line in text.splitlines(keepends=True):
        bare = line.lstrip(" ")
        indent = len(line) - len(bare)
        column += [*range(1, len(line)), 0]  # a line's end belongs to the next line, at 0
        indents += [indent] * len(line)
        past += [indent <= at < len(line) - 1 for at in range(len(line))]
    column, indents, past = np.array(column, float), np.array(indents), np.array(past)
    everywhere = np.ones(len(text), bool)
    return {
        QUOTES: (inside_quotes(text, closing), everywhere),
        COLUMN: (column, everywhere),
        VERSE: (indents >= 4, past),  # verse and headings; an indentation is known only after its end
        PARAGRAPH: (indents == 2, past),
    }


# ── n-grams as a baseline ─────────────────────────────────────────────────────────────────────────────────────────────


def ngram_loss(book, order):
    """Return the held-out nats per character of an n-gram model, smoothed as in Witten and Bell 1991 (method C)."""
    ids, begin = book.ids, book.held_out.start
    counts = [defaultdict(Counter) for _ in range(order)]
    for length, table in enumerate(counts):
        for at in range(length, book.train.stop):
            table[tuple(ids[at - length : at])][ids[at]] += 1
    total = 0.0
    for at in range(begin, len(ids)):
        p = 1.0 / len(book.characters)
        for length, table in enumerate(counts):
            seen = table.get(tuple(ids[at - length : at]))
            if seen:
                p = (seen[ids[at]] + len(seen) * p) / (seen.total() + len(seen))
        total -= math.log(p)
    return total / (len(ids) - begin)


# ── training ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class CharacterModel(nn.Module):
    def __init__(self, characters, units):
        super().__init__()
        self.embedding = nn.Embedding(characters, WIDTH)
        # f = 1 - i keeps c an average between -1 and 1 in texts of any length: otherwise most units saturate
        self.lstm = layers.LSTM(units, return_sequences=True, return_state=True, input_size=WIDTH, coupled=True)
        with torch.no_grad():  # f begins open, for a different time per unit, up to LONGEST steps
            self.lstm.cell.bias[:units] = -torch.empty(units).uniform_(1.0, LONGEST).log()
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(units, characters)

    def forward(self, ids, state):
        y, *state = self.lstm(self.embedding(ids), initial_state=state)
        return self.head(self.dropout(y)), state

    def network(self):
        """Return it as a Network that outputs probabilities."""
        parts = nn.Sequential(self.embedding, self.lstm, self.head, nn.Softmax(-1))
        return cs.load(parts)


def train(book, seed, size):
    """Return the network before and after training on the first part of the book, read in parallel rows."""
    torch.manual_seed(seed)
    model = CharacterModel(len(book.characters), size["units"])
    untrained = model.network()
    ids = book.ids[book.train]
    length = (len(ids) - 1) // size["rows"]
    x, y = (torch.tensor(ids[at : at + length * size["rows"]].reshape(size["rows"], length)) for at in (0, 1))
    optimizer = torch.optim.Adam(model.parameters())
    for epoch in range(size["epochs"]):
        for group in optimizer.param_groups:
            group["lr"] = 0.004 * 0.5 * (1.0 + math.cos(math.pi * epoch / size["epochs"]))
        layers.truncated_backward(
            model, x, y, nn.functional.cross_entropy, size["steps"], optimizer=optimizer, max_norm=1.0
        )
    return untrained, model.network()


# ── units that track ──────────────────────────────────────────────────────────────────────────────────────────────────


def ranks(values):
    """Return the ranks of values along the first axis, from 0 to 1; ties share a rank."""
    found = np.empty(values.shape)
    for column in np.ndindex(values.shape[1:]):
        at = (slice(None), *column)
        _, inverse, counts = np.unique(values[at], return_inverse=True, return_counts=True)
        ends = np.cumsum(counts)
        found[at] = (ends - counts / 2.0)[inverse] / len(values)
    return found


def tracking(ranked, truth):
    """Return how well each unit tracks a label, -1 to 1: 2·AUC - 1 for a binary label, else Spearman's rho.

    Takes ranks `[N, H]` and a label `[N]`, or several `[S, N]`; returns `[H]` or `[S, H]`.
    """
    if truth.dtype == bool:
        share = truth.mean(axis=-1, keepdims=True)
        return 2.0 * (truth.astype(float) @ ranked / truth.sum(axis=-1, keepdims=True) - 0.5) / (1.0 - share)
    truth = ranks(truth.T).T
    truth = (truth - 0.5) / truth.std(axis=-1, keepdims=True)
    apart = ranked - 0.5
    return truth @ (apart / np.maximum(apart.std(axis=0), TINY)) / len(ranked)


class Reading:
    """The values of the units while a network reads a part of the book."""

    def __init__(self, net, book, part):
        begin = part.start - WARM
        t = net.trace(book.ids[None, begin : part.stop])
        self.part, self.lstm = part, t["layer_1"].cells[0]
        self.text = book.text[part]
        self.gates = {gate: self.lstm[gate][0, WARM:] for gate in "ifgoc"}
        self.c = self.gates["c"]
        self.y = t.y[0, WARM:]
        every = truths(book.text, book.closing)
        self.truths = {name: (truth[part], counts[part]) for name, (truth, counts) in every.items()}

    def counted(self, name):
        """Return c and the label, at the characters that count: `[N, H]` and `[N]`."""
        truth, counts = self.truths[name]
        return self.c[counts], truth[counts]

    def tracking(self, name):
        c, truth = self.counted(name)
        return tracking(ranks(c), truth)

    def by_chance(self, name, seed):
        """Return the best score of all units for labels shifted along the text, by a different offset each time."""
        c, truth = self.counted(name)
        shifts = np.random.default_rng(seed).integers(500, len(truth) - 500, SHIFTS)
        return np.abs(tracking(ranks(c), np.array([np.roll(truth, shift) for shift in shifts]))).max(axis=1)


def together(choose, held_out, name):
    """Return how well all units together track a label in the held-out part, by ridge regression on the other part."""
    (x, y), (ahead, truth) = choose.counted(name), held_out.counted(name)
    x, ahead = np.tanh(x, dtype=np.float64), np.tanh(ahead, dtype=np.float64)
    mean, scale = x.mean(axis=0), np.maximum(x.std(axis=0), TINY)
    x, ahead = (x - mean) / scale, (ahead - mean) / scale
    weights = np.linalg.solve(x.T @ x + 0.01 * len(x) * np.eye(x.shape[1]), x.T @ (y - y.mean()))
    return float(tracking(ranks(ahead @ weights)[:, None], truth)[0])


def find_units(book, untrained, net, seed):
    """Return for each label the unit that tracks it best in one part, and its score in the other."""
    before, after = ([Reading(one, book, part) for part in (book.choose, book.held_out)] for one in (untrained, net))
    found = {}
    for name in after[0].truths:
        chosen, figures = [], []
        for choose, held_out in (before, after):
            unit = int(np.abs(choose.tracking(name)).argmax())
            chosen.append(unit)
            figures.append(held_out.tracking(name)[unit])
        chance = after[1].by_chance(name, seed)
        found[name] = {
            "unit": chosen[1],
            "figure": figures[1],
            "untrained": abs(figures[0]),
            "chance": (float(np.median(chance)), float(chance.max())),
            "together": together(*after, name),
            "half-life": float(after[1].lstm.half_lives()[chosen[1]]),
        }
    return found, after[1]


# ── the effect of ablating one ────────────────────────────────────────────────────────────────────────────────────────


class Targets:
    """Losses on the next character, by its kind, over the held-out part, read in eight rows."""

    def __init__(self, book):
        begin, end = book.held_out.start, len(book.ids) - 1
        length = (end - begin) // 8
        starts = begin - WARM + length * np.arange(8)
        steps = starts[:, None] + np.arange(WARM + length)
        self.x, self.following = book.ids[steps], book.ids[steps + 1]
        counted = np.arange(WARM + length) >= WARM
        closing = book.closing[steps + 1]
        self.kinds = {
            "closing quote": counted & closing,
            "apostrophe": counted & (self.following == book.of("'")) & ~closing,
            "opening quote": counted & (self.following == book.of("`")),
            "line end": counted & (self.following == book.of("\n")),
            "all": np.broadcast_to(counted, closing.shape),
        }
        inside = inside_quotes(book.text, book.closing)[steps]
        paused = counted & np.isin(self.x, [book.of(mark) for mark in ",.!?"])
        self.paused = {"inside": paused & inside, "outside": paused & ~inside}
        self.mark = book.of("'")

    def losses(self, y):
        """Return the mean nats at each kind, for probabilities `[8, T, characters]`."""
        nats = -np.log(np.take_along_axis(y, self.following[..., None], axis=2)[..., 0])
        return {kind: float(nats[where].mean()) for kind, where in self.kinds.items()}

    def closing_loss(self, y):
        return self.losses(y)["closing quote"]

    def closes(self, y):
        """Return the mean probability of the closing mark after , . ! and ?, inside quotes and outside."""
        return {where: float(y[steps, self.mark].mean()) for where, steps in self.paused.items()}


def fixed(net, unit, value):
    return net.edit(cs.Patch("layer_1", "c", unit, value=float(value)))


def sample(book, net, rows, steps, seed=0):
    """Return the network's continuations of excerpts of the second part."""
    rng = np.random.default_rng(seed)
    starts = book.choose.start + np.linspace(0, 14000, rows).astype(int)
    stream = net.stream(batch=rows)
    y = stream.run(book.ids[starts[:, None] + np.arange(WARM)])[:, -1]
    written = np.empty((rows, steps), int)
    for step in range(steps):
        drawn = rng.random((rows, 1)) * y.sum(axis=1, keepdims=True)
        written[:, step] = (y.cumsum(axis=1) < drawn).sum(axis=1).clip(max=y.shape[1] - 1)
        y = stream.step(written[:, step])
    return ["".join(book.characters[n] for n in row) for row in written]


def unmatched(texts):
    """Return the share of mismatched quote marks: opening while one is open, closing while none is."""
    marks = wrong = 0
    for text in texts:
        inside = None  # the excerpt may have left one open
        for character, closes in zip(text, closing_quotes(text), strict=True):
            if character == "`" or closes:
                opens = character == "`"
                if inside is not None:
                    marks, wrong = marks + 1, wrong + (opens == inside)
                inside = opens
    return wrong / max(marks, 1)


def too_long(texts, longest):
    """Return the share of whole lines that are longer than any line of the book."""
    lengths = np.array([len(line) for text in texts for line in text.split("\n")[1:-1] if line.strip()])
    return float((lengths > longest).mean()) if len(lengths) else math.nan


def ablate_column(book, net, reading, unit, size):
    """Return the loss at line ends, and the share of overlong lines in samples, with and without a unit."""
    at, longest = Targets(book), max(map(len, book.text.splitlines()))
    nets = {"unchanged": net, "without": fixed(net, unit, reading.c[:, unit].mean())}
    return {
        name: (at.losses(one(at.x))["line end"], too_long(sample(book, one, *size["sampled"]), longest))
        for name, one in nets.items()
    }


def ablate_unit(book, net, reading, unit, size, seed):
    """Return the effect of ablating a unit, and of ablating each of some others instead."""
    at = Targets(book)
    ranked = cs.ablate(net, at.x, "layer_1", how="mean", gate="c", metric=at.closing_loss)
    effects = ranked.effects["layer_1", 0]
    others = np.delete(np.arange(len(effects)), unit)
    controls = np.random.default_rng(seed).choice(others, size["controls"], replace=False)
    inside, _ = reading.truths[QUOTES]
    found = {"effects": effects, "place": int((effects > effects[unit]).sum()) + 1, "plain": {}, "unit": {}}
    for name, which in (("plain", None), ("unit", unit), *((f"control {n}", n) for n in controls)):
        c = None if which is None else reading.c[:, which]
        mean = net if which is None else fixed(net, which, c.mean())
        one = {"losses": at.losses(mean(at.x)), "unmatched": unmatched(sample(book, mean, *size["sampled"]))}
        if which is None:
            one["closes"] = at.closes(net(at.x))
        else:  # the unit signals an open quote where there is none, or the reverse
            forced = {"outside": c[inside].mean(), "inside": c[~inside].mean()}
            one["closes"] = {where: at.closes(fixed(net, which, value)(at.x))[where] for where, value in forced.items()}
        found[name] = one
    return found


# ── plots ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def excerpt(text, words, lines):
    """Return the bounds of an excerpt of whole lines that begins at the line with the given words."""
    begin = text.rindex("\n", 0, text.index(words)) + 1
    end = begin
    for _ in range(lines):
        end = text.index("\n", end) + 1
    return slice(begin, end)


def draw_text(axis, text, values, title):
    """Draw a text, each character on the colour of a unit's value at it."""
    low, high = np.percentile(values, (2, 98))
    text_lines = text.splitlines(keepends=True)
    shades = np.full((len(text_lines), max(map(len, text_lines))), np.nan)
    at = 0
    for row, line in enumerate(text_lines):
        shades[row, : len(line)] = (values[at : at + len(line)] - low) / (high - low)
        at += len(line)
        for column, character in enumerate(line.rstrip("\n")):
            axis.text(column, row, character, ha="center", va="center", family="monospace", fontsize=7)
    axis.imshow(shades.clip(0.0, 1.0), cmap="PuOr", vmin=-0.5, vmax=1.5, aspect="auto", interpolation="nearest")
    axis.set_title(title, fontsize=9, loc="left")
    axis.set_axis_off()


def draw_units(book, reading, found, path):
    dialogue, verse = excerpt(reading.text, DIALOGUE, 9), excerpt(reading.text, POEM, 9)
    figure, axes = plt.subplots(3, figsize=(7.2, 6.6), layout="constrained")
    for axis, name, part in zip(axes, (QUOTES, COLUMN, VERSE), (dialogue, dialogue, verse), strict=True):
        unit = found[name]["unit"]
        draw_text(axis, reading.text[part], np.tanh(reading.c[part, unit]), f"unit {unit}, tanh c: {name}")
    save(figure, path)


def draw_ablation(unit, broken, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.0), layout="constrained", width_ratios=(3, 2))
    effects = broken["effects"]
    order = np.argsort(-effects)
    left.bar(range(len(effects)), effects[order], width=1.0, color=[HERE if n == unit else OTHERS for n in order])
    left.set_xlabel("units, by effect")
    left.set_ylabel("increase in nats at closing quotes")
    left.set_title(f"each unit's c fixed at its mean; unit {unit} dark", fontsize=9, loc="left")
    shares = [one["unmatched"] for name, one in broken.items() if name.startswith("control")]
    right.bar([0, 1], [broken["plain"]["unmatched"], broken["unit"]["unmatched"]], width=0.6, color=[OTHERS, HERE])
    right.plot(2 + np.linspace(-0.3, 0.3, len(shares)), shares, "o", markersize=3, color=HERE)
    right.set_xticks([0, 1, 2], ["unchanged", f"without\nunit {unit}", "without\nanother"])
    right.set_ylim(0, None)
    right.set_title("mismatched quote marks", fontsize=9, loc="left")
    save(figure, path)


def save(figure, path):
    drawn = BytesIO()
    figure.savefig(drawn, dpi=90)
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(128).save(path, optimize=True)  # a third of the size


# ── main program ──────────────────────────────────────────────────────────────────────────────────────────────────────


def say_units(found):
    print("  what                      unit  AUC or rho  half-life  all units  untrained  labels shifted: median, max")
    for name, one in found.items():
        figures = (abs(one["figure"]), one["together"], one["untrained"], *one["chance"])
        figure, whole, untrained, median, most = figures if name == COLUMN else ((1.0 + v) / 2.0 for v in figures)
        print(
            f"  {name:25}{one['unit']:5}{figure:12.3f}{one['half-life']:11.1f}{whole:11.3f}{untrained:11.3f}"
            f"{median:24.3f}, {most:.3f}"
        )


def say_gates(book, reading, unit):
    """Print the quote unit's gates at the marks."""
    closing, inside = book.closing[reading.part], reading.truths[QUOTES][0]
    text = np.array(list(reading.text))
    apostrophe = (text == "'") & ~closing & inside
    kinds = {
        "opening quote": text == "`",
        "closing quote": closing,
        "the next character": np.roll(closing, 1),
        "apostrophe inside": apostrophe,
        "the next letter": np.roll(apostrophe, 1),
        "letters inside": np.char.isalpha(text) & inside,
        "letters outside": np.char.isalpha(text) & ~inside,
    }
    gates = {gate: values[:, unit] for gate, values in reading.gates.items()}
    print(f"  unit {unit} at:{'':18}f      i·g        c")
    for kind, where in kinds.items():
        f, ig, c = gates["f"][where], (gates["i"] * gates["g"])[where], gates["c"][where]
        print(f"  {kind:20}{f.mean():9.3f}{ig.mean():+9.3f}{c.mean():+9.3f}")


def say_broken(broken):
    controls = [one for name, one in broken.items() if name.startswith("control")]
    print(f"  by the loss at closing quotes, it ranks {broken['place']} of {len(broken['effects'])} units")
    print(f"  {'':34}{'unchanged':>9}{'without':>9}   without others: median, max")
    rows = {f"nats at: {kind}": ("losses", kind) for kind in broken["plain"]["losses"]}
    rows |= {f"P(') after , . ! ?, {where}": ("closes", where) for where in broken["plain"]["closes"]}
    rows["mismatched marks, samples"] = ("unmatched", None)
    for what, (field, key) in rows.items():
        plain, without, *others = (
            one[field] if key is None else one[field][key] for one in (broken["plain"], broken["unit"], *controls)
        )
        far = max(others, key=lambda value: abs(value - plain))
        print(f"  {what:34}{plain:9.3f}{without:9.3f}   {np.median(others):.3f}, {far:.3f}")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(), help="the folder for the pictures")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the models; plots show the first"
    )
    parser.add_argument("--quick", action="store_true", help="a small model, one seed, for a quick try")
    parser.add_argument("--html", action="store_true", help="also write units.html, an interactive page")
    given = parser.parse_args(arguments)
    size, seeds = (QUICK, given.seeds[:1]) if given.quick else (FULL, given.seeds)
    torch.set_num_threads(1)  # a model this small doesn't benefit from more threads
    book = Book()
    orders = {order: ngram_loss(book, order) for order in ((1, 3) if given.quick else (1, 3, 5))}
    print(f"{len(book.ids)} characters, {len(book.characters)} kinds; 80 % training, 10 % validation, 10 % held out")
    print("nats per character held out: " + ", ".join(f"{order}-gram {loss:.3f}" for order, loss in orders.items()))
    given.out.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        untrained, net = train(book, seed, size)
        found, reading = find_units(book, untrained, net, seed)
        unit = found[QUOTES]["unit"]
        at = Targets(book)
        loss = at.losses(net(at.x))["all"]
        print(f"\nseed {seed}: LSTM of {size['units']} units, {loss:.3f} nats per character held out")
        say_units(found)
        say_gates(book, reading, unit)
        broken = ablate_unit(book, net, reading, unit, size, seed)
        say_broken(broken)
        column = ablate_column(book, net, reading, found[COLUMN]["unit"], size)
        print(f"  unit {found[COLUMN]['unit']}, position in the line: ", end="")
        said = (f"{name} {loss:.3f} nats at line ends, {share:.1%} of lines" for name, (loss, share) in column.items())
        print("; ".join(said) + " in samples longer than any line of the book")
        if seed == seeds[0]:
            draw_units(book, reading, found, given.out / "units-text.png")
            draw_ablation(unit, broken, given.out / "units-ablated.png")
            without = fixed(net, unit, reading.c[:, unit].mean())
            for what, one in (("unchanged", net), (f"without unit {unit}", without)):
                print(f"  a sample {what}:\n" + indented(sample(book, one, *size["sampled"])[0]))
            if given.html:
                begin = reading.part.start + excerpt(reading.text, DIALOGUE, 9).start - WARM
                steps = slice(begin, begin + PAGE)
                title = f"Alice, character by character; unit {unit} tracks quotes"
                net.trace(book.ids[None, steps]).save_html(given.out / "units.html", book.text[steps], title=title)


def indented(text):
    return "\n".join(f"    | {line}" for line in text[:400].splitlines())


if __name__ == "__main__":
    main()
