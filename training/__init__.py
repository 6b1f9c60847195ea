"""Training: data, optimiser groups, schedule, the one step loop, checkpoints, recipes.

A recipe is plain Python over four things: `Batches` (what to read), `Settings` (how to learn), a loss function, `fit`.
Needs the `train` extra (`pip install "tileformer[train]"`).
"""

from tileformer.training.checkpoint import CheckpointError, latest, load_weights, read_state
from tileformer.training.data import Batch, Batches
from tileformer.training.loop import (
    Report,
    Settings,
    evaluate,
    fit,
    learning_rate_factor,
    make_optimizer,
    parameter_groups,
    resolve_precision,
    sequence_loss,
)

__all__ = [
    "Batch",
    "Batches",
    "CheckpointError",
    "Report",
    "Settings",
    "evaluate",
    "fit",
    "latest",
    "learning_rate_factor",
    "load_weights",
    "make_optimizer",
    "parameter_groups",
    "read_state",
    "resolve_precision",
    "sequence_loss",
]
