"""LoRA by peft on a converted model: every projection learns, also out_proj, which gets no gradient in torch's layers.

python examples/lora.py                       (needs the extra `hf`)
"""

import copy

import peft
import torch
from torch import Tensor, nn

from tileformer.decoder import convert


class Classifier(nn.Module):
    """A model that knows nothing of us: two of torch's encoder layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


def main(steps: int = 30) -> dict[str, int]:
    torch.manual_seed(0)
    x = torch.randn(64, 6, 32)
    label = (x[:, :, 0].sum(1) > 0).long()
    reached = {}
    for name, prepare in (("torch.nn", lambda model: None), ("tileformer", convert)):
        torch.manual_seed(1)
        model = Classifier()
        prepare(model)
        frozen = copy.deepcopy(model.state_dict())
        config = peft.LoraConfig(r=4, target_modules=["out_proj", "linear1", "linear2"], modules_to_save=["head"])
        tuned = peft.get_peft_model(model, config)
        optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(steps):
            loss = nn.functional.cross_entropy(tuned(x), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        adapters = [n for n, p in tuned.named_parameters() if "out_proj.lora_B" in n and p.grad is not None]
        reached[name] = len(adapters)
        print(f"{name}: loss {loss.item():.3f}, adapters of out_proj that learn: {len(adapters)} of 2")
        base = dict(tuned.get_base_model().named_parameters())
        assert torch.equal(
            base["encoder.layers.0.linear1.base_layer.weight"], frozen["encoder.layers.0.linear1.weight"]
        )
    assert reached["tileformer"] == 2
    return reached


if __name__ == "__main__":
    main()
