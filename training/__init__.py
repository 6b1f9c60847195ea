"""Training: data, optimiser groups, schedule, the one step loop, checkpoints, recipes.

A recipe is plain Python over four things: `Batches` (what to read), `Settings` (how to learn), a loss function, `fit`.
Needs the `train` extra (`pip install "tileformer[train]"`).
"""

from tileformer.training.checkpoint import CheckpointError, latest, load_weights, read_state
from tileformer.training.data.batches import Batch, Batches, LabelledBatches, PackedBatches
from tileformer.training.loop import evaluate, fit, resolve_precision
from tileformer.training.losses import classification_loss, language_loss, sequence_loss
from tileformer.training.optimizers import make_optimizer
from tileformer.training.settings import Settings

__all__ = [
    "Batch",
    "Batches",
    "CheckpointError",
    "LabelledBatches",
    "PackedBatches",
    "Settings",
    "classification_loss",
    "evaluate",
    "fit",
    "language_loss",
    "latest",
    "load_weights",
    "make_optimizer",
    "read_state",
    "resolve_precision",
    "sequence_loss",
]
