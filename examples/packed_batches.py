"""Train a language model on packed batches: documents end to end, no padding, and none sees another. Needs `train`.

python examples/packed_batches.py
"""

import torch

from tileformer.decoder import DecoderLM, DecoderLMConfig, generate
from tileformer.training import PackedBatches, Settings, fit, language_loss


def main(tokens: int = 40_000) -> float:
    torch.manual_seed(0)
    # Documents of 4 to 17 tokens that count up by one or by two. Ids 0, 1 and 2 are padding, begin and end.
    documents = [[3 + (start + step * n) % 20 for n in range(4 + start % 14)] for start in range(60) for step in (1, 2)]
    batches = PackedBatches(documents, batch_tokens=256, seed=0)
    first = next(iter(batches))
    kept, places = sum(map(len, documents)), sum(batch.source.numel() for batch in PackedBatches(documents, 256))
    padded = len(documents) * (max(map(len, documents)) + 1)
    print(f"{kept} tokens in {places} places; padded to the longest they would take {padded}")

    model = DecoderLM(
        DecoderLMConfig(23, d_model=32, nhead=2, num_layers=1, dim_feedforward=64, dropout=0.0, max_length=32)
    )
    model.eval()
    with torch.no_grad():  # packed or alone, a document's logits are the same
        packed = model(first.source, cu_seqlens=first.cu_seqlens)
        start, end = first.cu_seqlens[1:3].tolist()
        alone = model(first.source[:, start:end])
    difference = (packed[:, start:end] - alone).abs().max().item()
    print(f"a document packed and alone: largest difference {difference:.1e}")
    assert difference < 1e-5

    report = fit(model, batches, Settings(tokens, lr=1e-2, precision="fp32"), language_loss)
    answer = generate(model.eval(), torch.tensor([[1, 5, 7, 9]]), max_length=3)[0].tolist()
    print(f"loss {report.loss:.2f} after {report.steps} steps; 5 7 9 goes on with", *answer)
    assert answer == [11, 13, 15]
    return difference


if __name__ == "__main__":
    main()
