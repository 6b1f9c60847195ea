"""Export a model with our layers to ONNX, of any batch and length, and run it without torch. Needs the extra `export`.

python examples/onnx_export.py
"""

import tempfile
from pathlib import Path

import numpy
import onnxruntime
import torch
from torch import Tensor, nn

from tileformer.decoder import TransformerEncoder, TransformerEncoderLayer


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        layer = TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.encoder, self.head = TransformerEncoder(layer, 1), nn.Linear(32, 7)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) int64, 0 is padding -> (B, T, 7)
        return self.head(self.encoder(self.embedding(tokens), src_key_padding_mask=tokens == 0))


def main() -> float:
    torch.manual_seed(0)
    model = Tagger().eval()
    shape = {"tokens": {0: torch.export.Dim("batch"), 1: torch.export.Dim("time")}}
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "tagger.onnx"))
        torch.onnx.export(
            model, (torch.randint(1, 50, (2, 9)),), file, dynamo=True, dynamic_shapes=shape, verbose=False
        )
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        size = Path(file).stat().st_size + sum(path.stat().st_size for path in Path(folder).glob("*.data"))
    tokens = torch.randint(1, 50, (3, 14))  # another batch, another length
    tokens[1, 10:] = 0
    (result,) = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})
    with torch.no_grad():
        expected = model(tokens).numpy()
    difference = float(numpy.abs(result - expected).max())
    print(f"{size:,} bytes; largest difference of onnxruntime to torch: {difference:.1e}")
    assert difference < 1e-4
    return difference


if __name__ == "__main__":
    main()
