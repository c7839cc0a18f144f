"""Make a model and fit it, for any task, and the result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any

import torch

from cellstack.network import Network
from cellstack.nodes import MLSTM
from cellstack.nodes.recurrent import Bidirectional
from cellstack.train import history
from cellstack.train.baseline import Baseline
from cellstack.train.checks import UsageError
from cellstack.train.confusion import confusion_panels
from cellstack.train.examples import Data
from cellstack.train.history import Log, event_writer
from cellstack.train.learner import Fit, Timed
from cellstack.train.loop import cost_of_fit, learn
from cellstack.train.options import FitOptions
from cellstack.train.predict import predict
from cellstack.train.processes import processes
from cellstack.train.recurrent import check_supported
from cellstack.train.search import Trials

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECURRENT = ("Recurrent", "Bidirectional", "MLSTM")
NODE_NAMES = {
    "Changes": "changes",
    "Merge": "inputs",
    "Conv1D": "filters",
    "LayerNorm": "norm",
    "GlobalPool": "pool",
    "Dense": "head",
}


@dataclass(repr=False)
class Result:
    """A trained network.

    Args:
        network: the network with its metadata; it doesn't need torch.
        model: the same network as a torch module.
        fit: the course of the fit.
        scores: scores on test data, see `Predictions`; {} without test data.
        rank: number of this process among those that trained; process 0 writes and prints.
        validated: number of examples in the validation part.
        summary: the text of `sentence`, if several fits made the network.
        understood: how the data was read, a sentence each.
        baseline: what a simple rule achieves on the same held-out sequences; None without any, and for other data.
        trials: the trials of a search, the best one first; a list that is shown as a table.
        chosen: why this fit was kept, if there were several; "" otherwise.
    """

    network: Network
    model: Any
    fit: Fit
    scores: dict[str, Any]
    rank: int = 0
    validated: int = 0
    summary: str = ""
    understood: list[str] = field(default_factory=list)
    baseline: Baseline | None = None
    trials: Trials = field(default_factory=Trials)
    chosen: str = ""

    def __repr__(self) -> str:
        """Describe the result in about six lines, without the history."""
        return "\n  ".join([f"Result: {self.described}", *self.sentence.split("; "), self.fit.took])

    @property
    def described(self) -> str:
        """The network in one line."""
        nodes = [node for node in self.network.nodes if type(node).__name__ in RECURRENT]
        layers = Counter(map(_named, nodes))
        said = [
            f"{count} {'layers' if name.startswith('MLSTM') else 'networks'} of {name}" if count > 1 else name
            for name, count in layers.items()
        ]
        weights = sum(parameter.numel() for parameter in self.model.parameters())
        classes = [f"{len(self.labels)} classes"] * bool(self.labels)
        return ", ".join([*said, f"{weights:,} weights", *classes])

    @property
    def history(self) -> list[dict[str, Any]]:
        """One entry per epoch; its metrics are of the validation part: see `Fit`."""
        return self.fit.history

    @property
    def labels(self) -> tuple[Any, ...]:
        """The classes, in the order of the network's outputs; () for regression."""
        return self.network.labels

    def predict(self, data: Any, y: Any = None, **options: Any) -> Any:
        """Predict for new data with the network: see `Network.predict`."""
        return predict(self.network, data, y, **options)

    def plot(self) -> Figure:
        """Return a matplotlib figure: the losses and metrics by epoch, and the confusion matrix of the test data.

        Raises:
            UsageError: matplotlib isn't installed; no epoch was completed, and there is no such matrix.
        """
        found = history.curves(self.history, self.fit.best) if self.history else []
        found += confusion_panels(self.scores, self.labels)
        if not found:
            raise UsageError("expected at least one completed epoch to plot, got none")
        return history.panels(found)

    @property
    def sentence(self) -> str:
        """What stopped the training, which epoch was kept, its scores on held-out data, and those of a simple rule."""
        parts = (self._stopped(), self._kept(), self.chosen, self._measured(), self._compared())
        return self.summary or "; ".join(part for part in parts if part)

    def _stopped(self) -> str:
        done, fit = len(self.fit.history), self.fit
        how = {
            "epochs": f"trained for {'all ' * (done != 1)}{_count(done, 'epoch')}",
            "patience": f"stopped after {_count(done, 'epoch')}, because the validation loss had not decreased for "
            f"{done - fit.best['epoch'] if fit.best else 0}",
            "ctrl-c": f"stopped by Ctrl-C after {_count(done, 'complete epoch')}",
            "callback": f"stopped by a callback after {_count(done, 'epoch')}",
        }
        return how[fit.stopped]

    def _kept(self) -> str:
        best = self.fit.best
        if best is None:
            return "no epoch was completed: the weights are those of the last step"
        why = "with the lowest validation loss"
        if not self.fit.selects:
            few = f"as {_count(self.validated, 'validation example')} can't select one"
            why = f"the last, {few if self.validated else 'without a validation part'}"
        return f"kept epoch {best['epoch']}, {why}"

    def _measured(self) -> str:
        best, names = self.fit.best, ("accuracy", "mae", "rmse", "bits_per_character")
        scored = [f"{history.in_words(name)} {self.scores[name]:.4g}" for name in names if name in self.scores]
        if scored:
            return f"on the test part: {', '.join(scored)}"
        if best is None or "validation_loss" not in best:
            return "no data was held out to measure its accuracy on"
        found = [f"{history.in_words(name)} {best[name]:.4g}" for name in names if name in best]
        found = ", ".join(found or [f"loss {best['validation_loss']:.4g}"])
        selected = ", which also selected the epoch" * self.fit.selects
        return f"on the {_count(self.validated, 'validation example')}{selected}: {found}"

    def _compared(self) -> str:
        rule, known = self.baseline, self.scores or self.fit.best or {}
        if rule is None or rule.name not in known:
            return ""
        better = ": better than the network" if rule.wins(known[rule.name]) else ""
        others = ", ".join(f"{other.what}: {other.score:.4g}" for other in rule.others)
        said = f"for comparison, {rule.what}: {history.in_words(rule.name)} {rule.score:.4g}"
        return said + f" ({others})" * bool(others) + better


def _named(node: Any) -> str:
    """Return a recurrent node in words."""
    if isinstance(node, Bidirectional):
        return f"bidirectional {node.forward.summary}"
    return f"MLSTM of {node.summary}" if isinstance(node, MLSTM) else node.summary


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def fitted(make: Callable[[], Any], data: Data, options: FitOptions) -> tuple[Any, Fit, int]:
    """Make a model and fit it; return the model, the `Fit` and this process's rank.

    Args:
        make: makes the model, a `Learner`; its random numbers depend on the seed.
        data: the training data.
        options: how to fit.

    Raises:
        UsageError: see `learn`.
        Timed: always with `options.timing`, after timing some steps.
        MemoryError: torch can't allocate the memory of a step.
    """
    try:
        with processes(options.device) as team, ExitStack() as stack:
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                torch.manual_seed(options.seed)
                model = make()
            check_supported(model, team.device, options.inspect)
            if options.timing:
                raise Timed(cost_of_fit(model, data, options, team))
            writer = None
            if options.inspect and options.events is not None and team.rank == 0:
                writer = stack.enter_context(event_writer(options.events) or nullcontext())
            if options.log is not None:  # only the first of several processes calls it
                log = stack.enter_context(closing(Log(options.log)))
                options = replace(options, callbacks=(*options.callbacks, log))
            return model, learn(model, data, options, team, writer), team.rank
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise MemoryError(str(error).partition("can't allocate memory: ")[2] or str(error)) from None
        raise


def as_network(model: Any, metadata: dict[str, Any]) -> Network:
    """Return a trained model as a Network, with its layers named `layer_0`, `layer_1` … and other nodes by kind."""
    if getattr(model, "whole", False):
        return model.to_network(metadata)
    nodes = model.to_nodes()
    kinds = [type(node).__name__ for node in nodes]
    if getattr(model, "changes", None) is not None:
        kinds[kinds.index("Conv1D")] = "Changes"
    kinds = ["Projection" if after == "MLSTM" else kind for kind, after in zip(kinds, [*kinds[1:], ""], strict=True)]
    layer = (f"layer_{n}" for n in count())
    names = [next(layer) if kind in RECURRENT else NODE_NAMES.get(kind, kind.lower()) for kind in kinds]
    names = [f"{name}_{n}" if names.count(name) > 1 else name for n, name in enumerate(names)]
    before = ["x", *names]  # before[n] is the input of node n
    wires = [(*before[n - 1 : n], before[n]) if kind == "Merge" else (before[n],) for n, kind in enumerate(kinds)]
    return Network(tuple(nodes), tuple(names), metadata, wires=wires, _warn=False)
