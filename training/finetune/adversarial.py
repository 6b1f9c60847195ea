"""Two adversaries: generated features against one extra class (GAN-BERT), and perturbed embeddings (FGM).

Croce et al. 2020, "GAN-BERT"; Salimans et al. 2016 for its losses; Miyato et al. 2017, "Adversarial training methods
for semi-supervised text classification". Each is a loss and a backward for the one loop, `fit`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tileformer.decoder import Classifier
from tileformer.kernels import cross_entropy
from tileformer.training.loop import LossFunction

EPSILON = 1.0  # length of the step that FGM takes in the embedding weights


def fgm_backward(model: Any, batch: Any, loss_fn: LossFunction, scale: Tensor) -> Tensor:
    """Gradients of the loss, plus those after a step of length `EPSILON` up the gradient of the token embedding.

    The embedding is back at its old bits when this returns. Returns the loss without the step.
    """
    weight = model.backbone.embedding.weight
    before = weight.detach().clone()
    loss = loss_fn(model, batch)
    (loss * scale).backward()
    with torch.no_grad():
        weight += EPSILON * weight.grad / weight.grad.norm().clamp(min=1e-12)
    try:
        (loss_fn(model, batch) * scale).backward()
    finally:
        with torch.no_grad():
            weight.copy_(before)
    return loss


class Gan(nn.Module):
    """A classifier as discriminator, with one class more for features that a generator made from noise.

    The head's logits are the real classes, `fake` gives the extra one. Rows of a batch with weight 0 have no label: of
    them the discriminator only learns that they are real.
    """

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        width = classifier.backbone.config.d_model
        self.classifier = classifier
        self.fake = nn.Linear(width, 1)
        into, out = nn.Linear(width, width), nn.Linear(width, width)
        self.generator = nn.Sequential(into, nn.LeakyReLU(0.2), nn.Dropout(0.1), out)

    def judge(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, classes) of the real classes, and log-odds (B,) that features (B, C) are generated."""
        real = self.classifier.head(features).float()
        return real, self.fake(features).float().squeeze(1) - real.logsumexp(1)

    def generate(self, like: Tensor) -> Tensor:
        """Features (B, C) from noise, as many as `like`."""
        return self.generator(torch.randn_like(like))

    def loss(self, batch: Any) -> Tensor:
        """Losses (2,) of the discriminator (with its encoder) and of the generator: each is its own player's alone."""
        real = self.classifier.features(batch.source)
        made = self.generate(real)
        logits, odds = self.judge(real)
        labels = torch.where(batch.weights > 0, batch.labels, -100)
        _, odds_made = self.judge(made.detach())
        known = cross_entropy(logits, labels, reduction="sum") / (labels >= 0).sum().clamp(min=1)
        discriminator = known + F.softplus(odds).mean() + F.softplus(-odds_made).mean()
        matching = (real.detach().mean(0) - made.mean(0)).square().mean()
        generator = F.softplus(self.judge(made)[1]).mean() + matching
        return torch.stack((discriminator, generator))


def gan_backward(model: Any, batch: Any, loss_fn: LossFunction, scale: Tensor) -> Tensor:
    """One step of both players by `Gan.loss`: the generator's weights see its loss alone, all others the
    discriminator's alone."""
    discriminator, generator = loss_fn(model, batch) * scale
    makers = list(model.generator.parameters())
    # First, because the other backward frees what the two losses share.
    gradients = torch.autograd.grad(generator, makers, retain_graph=True)
    discriminator.backward()
    for parameter, gradient in zip(makers, gradients, strict=True):
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    return discriminator / scale
