"""What cellstack's layers compute while a torch model runs or is trained; `cellstack.inspect` has the same names."""

from cellstack.train.monitoring.lightning import lightning_callback
from cellstack.train.monitoring.monitor import TrainingMonitor
from cellstack.train.monitoring.records import LayerRecord, TrainingRecord
from cellstack.train.monitoring.watch import Watch, watch

__all__ = ["LayerRecord", "TrainingMonitor", "TrainingRecord", "Watch", "lightning_callback", "watch"]
