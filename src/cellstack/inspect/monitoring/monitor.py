"""Inspection of layers during training: once per epoch, at one batch, without changing what training computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cellstack.inspect.monitoring.records import LayerRecord, TrainingRecord, examined

if TYPE_CHECKING:
    from types import TracebackType

    from torch import nn


class TrainingMonitor:
    """Inspects every cellstack layer of a model during training: its gates, states, weights and gradients.

    It inspects one batch per epoch, the first whose gradient reaches a layer; other batches run unchanged. In the
    inspected batch too, outputs, gradients and weights are bit-identical to those without the monitor: all other
    figures come from running some rows of the batch once more, when `epoch` is called.

    Args:
        model: any module that contains cellstack layers, also within DistributedDataParallel, where the monitor sees
            this process's rows. Layers of foreign cells aren't supported; `left_out` has their names.
        every: inspect every n-th epoch, n = `every`.
        rows: the maximum number of rows of the batch to run once more.
        lags: the maximum number of steps to follow the gradient back.
        writer: a `torch.utils.tensorboard.SummaryWriter` that receives every record; None for no writer.

    Attributes:
        records: the records of all inspected epochs.
        left_out: layers that can't be inspected, and why.

    Raises:
        ValueError: no layer that can be inspected, or a number below 1.
        TypeError: not a torch module.

    >>> import torch
    >>> from cellstack import layers
    >>> model = torch.nn.Sequential(layers.LSTM(4, input_size=3), torch.nn.Linear(4, 1))
    >>> optimizer = torch.optim.Adam(model.parameters())
    >>> with TrainingMonitor(model) as monitor:
    ...     for epoch in range(2):
    ...         for x, y in [(torch.randn(8, 20, 3), torch.randn(8, 1))]:
    ...             optimizer.zero_grad()
    ...             torch.nn.functional.mse_loss(model(x), y).backward()
    ...             optimizer.step()
    ...         record = monitor.epoch()
    >>> record.epoch, list(record.layers), record.layers["0"].lags["carried"].shape
    (2, ['0'], (20,))
    """

    def __init__(self, model: nn.Module, every: int = 1, rows: int = 32, lags: int = 256, writer: Any = None) -> None:
        from cellstack.layers import RNN
        from cellstack.layers.cell_base import Cell as LayerCell
        from cellstack.layers.observer import Observer

        if not hasattr(model, "named_modules"):
            raise TypeError(f"TrainingMonitor: expected a torch module, got {type(model).__name__}")
        for name, number in (("every", every), ("rows", rows), ("lags", lags)):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"TrainingMonitor: expected {name} as a whole number from 1 on, got {number!r:.80}")
        self._every, self._writer, self._closed = every, writer, False
        self._observers: dict[str, Observer] = {}
        self.left_out: dict[str, str] = {}
        self.records: list[TrainingRecord] = []
        self.number = 0
        for name, module in model.named_modules():
            if isinstance(module, RNN):
                name = name or type(module).__name__
                if all(isinstance(cell, LayerCell) for cell in module.cells):
                    self._observers[name] = Observer(module, rows, lags)
                else:
                    self.left_out[name] = "its cells aren't cellstack's"
        if not self._observers:
            found = f"; not supported: {', '.join(self.left_out)}" if self.left_out else ""
            raise ValueError(f"TrainingMonitor: the model has no supported cellstack layers{found}")
        self._begin()

    def _begin(self) -> None:
        self.close()
        self._closed = False
        if self.number % self._every == 0:
            for observer in self._observers.values():
                observer.start()

    def skip(self, epochs: int) -> None:
        """Count epochs that ended before the monitor was created, for resumed training."""
        self.number += epochs
        self._begin()

    def epoch(self, step: int | None = None) -> TrainingRecord | None:
        """End an epoch: return its record, and begin the next. An epoch is the time between two calls.

        Args:
            step: the step under which the writer logs the record; None = the epoch's number.

        Returns:
            The record; None for an epoch that isn't inspected.

        Raises:
            RuntimeError: the monitor is closed.
        """
        if self._closed:
            raise RuntimeError("TrainingMonitor: the monitor is closed: call epoch() within its block")
        looked_at = self.number % self._every == 0
        self.number += 1
        record = None
        if looked_at:
            record = self._record()
            self.records.append(record)
            if self._writer is not None:
                record.to_tensorboard(self._writer, step)
        self._begin()
        return record

    def close(self) -> None:
        """Stop inspecting; the records stay."""
        self._closed = True
        for observer in self._observers.values():
            observer.stop()

    def __enter__(self) -> TrainingMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _record(self) -> TrainingRecord:
        layers: dict[str, LayerRecord] = {}
        found: list[tuple[int, str]] = [(7, f"{name}: isn't supported, {why}") for name, why in self.left_out.items()]
        for layer, observer in self._observers.items():
            looked = observer.looked()
            if looked is None:
                text = "no gradient reached it. It is frozen, wasn't called in training, or runs within torch.compile"
                found.append((1, f"{layer}: {text}, which isn't supported"))
                continue
            if observer.calls > 1:
                text = f"was called {observer.calls} times before a gradient reached it: the figures and the gradient"
                found.append((6, f"{layer}: {text} are those of the last call"))
            if observer.through_gates:
                text = "the loss also depends on its gates (return_gates), whose gradient isn't followed back"
                found.append((6, f"{layer}: {text}"))
            for number, one in enumerate(looked):
                name = layer if len(looked) == 1 else f"{layer}.cells[{number}]"
                layers[name], own = examined(one)
                found += [(rank, f"{name}: {sentence}") for rank, sentence in own]
        return TrainingRecord(
            self.number, layers, tuple(sentence for _, sentence in sorted(found, key=lambda one: one[0]))
        )

    def __repr__(self) -> str:
        return f"TrainingMonitor of {', '.join(self._observers)}: {len(self.records)} records"
