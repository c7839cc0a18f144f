"""What cellstack's layers compute while a torch model runs or is trained; `cellstack.inspect` has the same names."""

from cellstack.inspect.monitoring.monitor import TrainingMonitor
from cellstack.inspect.monitoring.records import LayerRecord, TrainingRecord
from cellstack.inspect.monitoring.watch import Watch, watch

__all__ = ["LayerRecord", "TrainingMonitor", "TrainingRecord", "Watch", "watch"]
