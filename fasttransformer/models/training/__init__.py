"""Training of the models: ``train(task, records, out, options)``.

>>> from fasttransformer.models.training import TrainingOptions
>>> TrainingOptions("summarize", steps=2000).warmup_steps
200
"""

from .checkpoints import Checkpoint
from .loop import Diverged, Interrupted, Result, train
from .options import TrainingOptions

__all__ = ["Checkpoint", "Diverged", "Interrupted", "Result", "TrainingOptions", "train"]
