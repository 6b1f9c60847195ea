"""Joint features: a transformer that reads order beside hashed character n-grams, which know short phrases at once.

The n-gram branch alone is about the TF-IDF baseline, as a layer: fastText's hashing (Joulin et al. 2016) with idf
weights. Each branch learns the labels by itself, and the sum of their logits predicts: a product of experts (Hinton
2002). Training the sum as well left each branch weaker in the runs tried, and the sum no better.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tileformer.decoder import Classifier, DecoderLM
from tileformer.kernels import cross_entropy

BUCKETS = 1 << 18


class NgramClassifier(nn.Module):
    """Logits (B, classes) from the 1- to `longest`-grams of tokens (B, T), hashed into `buckets` rows of a table.

    A gram weighs its idf, and the weights of a text have length 1. `count` makes the idf; without it all are equal.
    Grams that one text alone has weigh nothing: they say only which text it is.
    """

    idf: Tensor

    def __init__(self, classes: int, longest: int = 3, buckets: int = BUCKETS, pad_id: int = 0) -> None:
        super().__init__()
        self.longest, self.buckets, self.pad_id = longest, buckets, pad_id
        self.table = nn.EmbeddingBag(buckets, classes, mode="sum", padding_idx=0)
        self.bias = nn.Parameter(torch.zeros(classes))
        nn.init.zeros_(self.table.weight)
        self.register_buffer("idf", torch.ones(buckets))

    def count(self, rows: Sequence[Sequence[int]]) -> None:
        """Set the idf to log((1 + N) / (1 + n)) + 1 where n of the N rows have the gram; 0 where n is below 2."""
        seen = torch.zeros(self.buckets)
        for row in rows:
            seen[self.grams(torch.tensor([row])).unique()] += 1
        self.idf.copy_((((1 + len(rows)) / (1 + seen)).log() + 1) * (seen >= 2))

    def grams(self, tokens: Tensor) -> Tensor:
        """Bucket (B, longest * T) of each gram of tokens (B, T); 0 where it would reach into padding."""
        result, real = [], tokens != self.pad_id
        key, whole = torch.zeros_like(tokens), torch.ones_like(real)
        for size in range(self.longest):
            shifted = F.pad(tokens[:, size:], (0, size), value=self.pad_id)
            whole = whole & (shifted != self.pad_id)
            key = (key * 1_000_003 + shifted * 8_191 + size) % 2_147_483_647
            result.append(torch.where(whole, 1 + key % (self.buckets - 1), 0))
        return torch.cat(result, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, classes) of tokens (B, T) int64, padded behind each row."""
        grams = self.grams(tokens)
        weights = self.idf[grams] * (grams != 0)
        weights = weights / torch.linalg.vector_norm(weights, dim=1, keepdim=True).clamp(min=1e-6)
        return self.table(grams, per_sample_weights=weights) + self.bias


class JointClassifier(Classifier):
    """A `Classifier` plus an `NgramClassifier`: their logits are added."""

    def __init__(self, backbone: DecoderLM, num_classes: int, **options: Any) -> None:
        super().__init__(backbone, num_classes, **options)
        self.ngrams = NgramClassifier(num_classes, pad_id=backbone.config.pad_id)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, classes) of tokens (B, T) int64."""
        return super().forward(tokens) + self.ngrams(tokens)


def joint_loss(model: Any, batch: Any) -> Tensor:
    """Mean cross-entropy, in nats, of the transformer of a `JointClassifier` and of its n-grams, each by itself."""
    branches = Classifier.forward(model, batch.source), model.ngrams(batch.source)
    return torch.stack([cross_entropy(logits, batch.labels) for logits in branches]).mean()
