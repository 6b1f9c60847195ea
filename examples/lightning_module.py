"""Our layers in a LightningModule: nothing of Lightning has to know. Needs `pip install lightning`.

python examples/lightning_module.py
"""

import logging

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tileformer.decoder import TransformerEncoder, TransformerEncoderLayer
from tileformer.kernels import cross_entropy


class Sorter(lightning.LightningModule):
    """Learns which of 8 digits is the largest, one label a row."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, width)
        layer = TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True)
        self.encoder, self.head = TransformerEncoder(layer, 1), nn.Linear(width, 10)
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        digits, label = batch
        loss = cross_entropy(self.head(self.encoder(self.embedding(digits)).amax(1)), label)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main(steps: int = 40) -> list[float]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    digits = torch.randint(10, (steps * 32, 8))
    rows = list(zip(digits, digits.amax(1), strict=True))
    model = Sorter()
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    lightning.Trainer(max_epochs=1, accelerator="auto", devices=1, **quiet).fit(model, DataLoader(rows, 32))
    print(f"loss of the first step {model.losses[0]:.2f}, of the last {model.losses[-1]:.2f}")
    assert model.losses[-1] < model.losses[0] / 2
    return model.losses


if __name__ == "__main__":
    main()
