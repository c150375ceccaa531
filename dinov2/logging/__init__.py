"""What a run says: text logs, metrics of every step, progress on screen, curves, and errors as one sentence."""

from dinov2.logging.curves import plot_training_curves
from dinov2.logging.memory import peak_memory_gib
from dinov2.logging.metric_logger import MetricLogger
from dinov2.logging.program import end_program, run_program
from dinov2.logging.text_logs import setup_logging

__all__ = ["MetricLogger", "end_program", "peak_memory_gib", "plot_training_curves", "run_program", "setup_logging"]
