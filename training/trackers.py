"""Experiment trackers for `fit(..., on_record=)`: each makes a function that a line of the log is handed to.

fit(model, batches, settings, folder="runs/a", on_record=tensorboard("runs/a/tensorboard"))
"""

from collections.abc import Callable
from typing import Any

from tileformer.extras import optional_import
from tileformer.files import PathLike

Record = dict[str, Any]
OnRecord = Callable[[Record], None]


def tensorboard(folder: PathLike) -> OnRecord:
    """Scalars by step, in files that TensorBoard shows. ValueError without the package tensorboard."""
    optional_import("tensorboard")
    writer = optional_import("torch.utils.tensorboard").SummaryWriter(str(folder))

    def record(entry: Record) -> None:
        for name, value in _numbers(entry).items():
            writer.add_scalar(name, value, entry["step"])
        writer.flush()

    return record


def wandb(**options: Any) -> OnRecord:
    """A run of Weights & Biases; options: those of `wandb.init`. ValueError without the package wandb."""
    run = optional_import("wandb").init(**options)
    return lambda entry: run.log(_numbers(entry), step=entry["step"])


def trackio(**options: Any) -> OnRecord:
    """A run of trackio; options: those of `trackio.init`. ValueError without the package trackio."""
    run = optional_import("trackio").init(**options)
    return lambda entry: run.log(_numbers(entry), step=entry["step"])


def _numbers(entry: Record) -> Record:
    return {name: value for name, value in entry.items() if isinstance(value, int | float) and name != "step"}
