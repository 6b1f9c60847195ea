"""Fine-tuning methods: each a few lines over the one `fit`, from the same pretrained language model to a classifier.

    METHODS["lora"].run(context)        a trained `Classifier`

A method says what its model is made of (`build`) and how it is trained (`learn`); `Context` holds what they share.
"""

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tileformer.decoder import Classifier, DecoderLM, DecoderLMConfig, LoadReport, load_matching
from tileformer.decoder.adapters import Bottleneck, add_bottlenecks
from tileformer.extras import optional_import
from tileformer.training import checkpoint
from tileformer.training.data.augment import token_dropout
from tileformer.training.data.batches import Augment, LabelledBatches, PackedBatches
from tileformer.training.finetune.adversarial import Gan, fgm_backward, gan_backward
from tileformer.training.finetune.ngrams import JointClassifier, joint_loss
from tileformer.training.loop import LossFunction, fit
from tileformer.training.losses import classification_loss, language_loss
from tileformer.training.settings import Settings

Rows = Sequence[Sequence[int]]
Model = Any  # a Classifier on a DecoderLM; its parts are modules, which no type checker can know
# What one cell of a table may cost: more unlabelled texts than these are not used.
UNLABELLED, CONTINUED = 3000, 150_000  # texts; tokens
FROZEN_LR = 4.0  # times the learning rate, where few weights learn and the others hold still


@dataclass(frozen=True)
class Context:
    """What every method is given. Rows are ids with begin first; labels are numbers below `classes`.

    weights: tensors of the pretrained language model by name, or None (everything starts at random). unlabelled: texts
    of the train part without a label. epochs: how often the labelled rows are read. folder: where logs and checkpoints
    of each stage go (None: nowhere); stages that are there, whole or in part, are gone on with. meta: what must be the
    same for that.
    """

    config: DecoderLMConfig
    weights: Mapping[str, Tensor] | None
    rows: Rows
    labels: Sequence[int]
    unlabelled: Rows
    classes: int
    epochs: float
    batch_size: int = 32
    lr: float = 1e-3
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "auto"
    folder: Path | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def some_unlabelled(self) -> Rows:
        """At most `UNLABELLED` of the unlabelled rows, chosen by the seed. ValueError when there is none."""
        if not self.unlabelled:
            raise ValueError("this method needs texts without labels: give --labels fewer than there are")
        return random.Random(self.seed).sample(list(self.unlabelled), min(UNLABELLED, len(self.unlabelled)))


@dataclass(frozen=True)
class Method:
    """One way to make a classifier.

    build(backbone, classes) makes the model, also to load what was saved; learn(context, model) trains it and returns
    it. unlabelled: it has nothing to learn from when every text has its label.
    """

    name: str
    about: str
    learn: Callable[[Context, Model], Classifier]
    build: Callable[[DecoderLM, int], Classifier] = Classifier
    pretrained: bool = True
    share_layers: bool = False
    unlabelled: bool = False

    def make(self, config: DecoderLMConfig, classes: int) -> Classifier:
        """The method's model, all weights at random."""
        return self.build(DecoderLM(replace(config, share_layers=self.share_layers)), classes)

    def check(self, weights: Mapping[str, Tensor] | None) -> None:
        """ValueError where the method needs pretrained weights or a library, and there is none."""
        if self.pretrained and weights is None:
            raise ValueError(f"{self.name} starts from a pretrained model, and there is none: tileformer train reviews")
        if self.learn is _lora:
            optional_import("peft")

    def start(self, context: Context) -> tuple[Classifier, LoadReport | None]:
        """The model untrained, and what came of the pretrained weights (None: from scratch). ValueError as `check`."""
        self.check(context.weights)
        torch.manual_seed(context.seed)
        backbone = DecoderLM(replace(context.config, share_layers=self.share_layers))
        report = load_matching(backbone, context.weights or {}) if self.pretrained else None
        return self.build(backbone, context.classes).to(context.device), report

    def run(self, context: Context) -> Classifier:
        """The trained model, in eval mode. ValueError: no pretrained weights, or no unlabelled texts, where needed."""
        return self.learn(context, self.start(context)[0]).eval()


def fit_labelled(
    context: Context,
    model: nn.Module,
    *,
    loss_fn: LossFunction = classification_loss,
    weights: Sequence[float] | None = None,
    augment: Augment | None = None,
    stage: str = "train",
    **options: Any,
) -> Any:
    """`fit` on the context's labelled rows, with a linear schedule; returns `model`.

    Frozen weights stay. `options` are `fit`'s (groups, backward).
    """
    rows, labels, size = context.rows, context.labels, context.batch_size
    batches = LabelledBatches(rows, labels, size, seed=context.seed, weights=weights, augment=augment)
    tokens = max(1, round(context.epochs * sum(map(len, rows))))
    _fit(context, model, batches, tokens, loss_fn, stage, **options)
    return model


def freeze_except(model: nn.Module, *parts: nn.Module) -> None:
    """Freeze `model` but for `parts`."""
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)


@torch.no_grad()
def predict_batched(
    function: Callable[[Tensor], Tensor], model: nn.Module, rows: Rows, batch_size: int = 256
) -> Tensor:
    """`function` of each row's tokens, in order, on the CPU: (N, ...) float32. `model`, whose it is, in eval mode."""
    device = next(model.parameters()).device
    training = model.training
    result: dict[int, Tensor] = {}
    model.eval()
    for batch in LabelledBatches(rows, [0] * len(rows), batch_size):
        result |= dict(zip(batch.rows, function(batch.to(device).source).float().cpu(), strict=True))
    model.train(training)
    return torch.stack([result[number] for number in range(len(rows))])


def probabilities(model: nn.Module, rows: Rows) -> Tensor:
    """Class probabilities (N, classes) of each row, on the CPU."""
    return predict_batched(lambda tokens: model(tokens).float().softmax(1), model, rows)


def _thawed(parts: Callable[[Model], list[nn.Module]], lr: float = FROZEN_LR / 2) -> Callable[..., Classifier]:
    """A method by which these parts learn and all others are frozen."""

    def learn(context: Context, model: Model) -> Classifier:
        freeze_except(model, *parts(model))
        return fit_labelled(replace(context, lr=lr * context.lr), model)

    return learn


def _gradual(context: Context, model: Model) -> Classifier:
    """Head first, then one layer more from the top, at last everything: an equal share of the epochs each."""
    layers = list(model.backbone.layers)
    share = replace(context, epochs=context.epochs / (len(layers) + 1))
    for free in range(len(layers) + 1):
        freeze_except(model, model.head, model.backbone.norm, *layers[len(layers) - free :])
        if free == len(layers):
            model.requires_grad_(True)
        fit_labelled(share, model, stage=f"free-{free}")
    return model


def _decay(context: Context, model: Model, factor: float = 0.6) -> Classifier:
    """Each layer learns `factor` times as fast as the one above it; the embeddings are below the first."""
    backbone = model.backbone
    stack = [nn.ModuleList([backbone.embedding, backbone.position]), *backbone.layers]
    scales = [factor ** (len(stack) - depth) for depth in range(len(stack))]
    groups = [{"params": [*part.parameters()], "lr_scale": scale} for part, scale in zip(stack, scales, strict=True)]
    return fit_labelled(context, model, groups=groups)


def _lora(context: Context, model: Model, rank: int = 8) -> Classifier:
    """peft's LoRA beside every projection (q, k and v packed in one, out, both of the feed-forward), then merged."""
    peft = optional_import("peft")
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["self_attn", "linear1", "linear2"])
    model.backbone.requires_grad_(False)
    tuner = peft.LoraModel(model.backbone, config, "default")  # puts its layers into the backbone
    fit_labelled(replace(context, lr=FROZEN_LR / 2 * context.lr), model)
    model.backbone = tuner.merge_and_unload()
    return model


def _with_bottlenecks(backbone: DecoderLM, classes: int) -> Classifier:
    """A classifier with a bottleneck behind attention and one behind the feed-forward of every layer."""
    model = Classifier(backbone, classes)
    add_bottlenecks(model)
    return model


def _pseudo(context: Context, model: Model, rounds: int = 2, threshold: float = 0.9) -> Classifier:
    """Learn the labels; then `rounds` times: label the unlabelled, keep the sure ones, start again with both.

    Of each class so many are kept, the surest first, that the classes stay in the proportions of the labels (Lee 2013;
    class balance as in Zou et al. 2018).
    """
    start, some = copy.deepcopy(model), context.some_unlabelled()
    fit_labelled(context, model, stage="round-0")
    known = torch.tensor(context.labels).bincount(minlength=context.classes)
    for number in range(rounds):
        sure, guesses = probabilities(model, some).max(1)
        result = guesses[sure >= threshold].bincount(minlength=context.classes)
        share = (result / known)[known > 0].min()
        chosen: list[int] = []
        for label, count in enumerate((share * known).int().tolist()):
            chosen += (sure * (guesses == label)).argsort(descending=True)[:count].tolist()
        rows = [*context.rows, *(some[index] for index in chosen)]
        labels = [*context.labels, *guesses[chosen].tolist()]
        epochs = context.epochs * len(context.rows) / len(rows)  # a round takes as long as the first one
        both = replace(context, rows=rows, labels=labels, epochs=epochs)
        model = fit_labelled(both, copy.deepcopy(start), stage=f"round-{number + 1}")
    return model


def _gan(context: Context, model: Model) -> Classifier:
    """Labelled rows and as many unlabelled again, so that a batch has both (Croce et al. 2020)."""
    some = context.some_unlabelled()
    copies = max(1, len(some) // len(context.rows))  # so a labelled row is read as often as by the other methods
    rows = [*list(context.rows) * copies, *some]
    labels = [*list(context.labels) * copies, *[0] * len(some)]
    weights = [1.0] * (len(rows) - len(some)) + [0.0] * len(some)
    both = replace(context, rows=rows, labels=labels, epochs=context.epochs / copies)
    gan = Gan(model).to(context.device)
    return fit_labelled(both, gan, weights=weights, loss_fn=Gan.loss, backward=gan_backward).classifier


def _continued(context: Context, model: Model) -> Classifier:
    """More language modelling on the target's texts, labelled or not, before the labels (Gururangan et al. 2020)."""
    texts = [row[1:] for row in (*context.rows, *context.unlabelled) if len(row) > 1]
    batches = PackedBatches(texts, 512, seed=context.seed, longest=context.config.max_length - 1)
    tokens = min(CONTINUED, sum(map(len, texts)))
    _fit(context, model.backbone, batches, tokens, language_loss, "language")
    return fit_labelled(context, model)


def _clusters(context: Context, model: Model, clusters: int = 20) -> Classifier:
    """k-means on the pooled states of texts without their labels, learn the cluster of each text, then the labels."""
    rows = [*context.rows, *context.unlabelled]
    rows = random.Random(context.seed).sample(rows, min(UNLABELLED, len(rows)))
    states = predict_batched(model.features, model, rows)
    seed, kmeans = context.seed % 2**32, optional_import("sklearn.cluster").KMeans
    result = kmeans(min(clusters, len(rows)), n_init=3, random_state=seed).fit_predict(states.numpy()).tolist()
    guesser = Classifier(model.backbone, clusters).to(context.device)
    fit_labelled(replace(context, rows=rows, labels=result, epochs=1), guesser, stage="clusters")
    return fit_labelled(context, model)


def _joint(context: Context, model: Model) -> Classifier:
    """Half as many epochs again, each with other characters hidden: two branches learn a text by heart sooner than one.

    The table of n-grams starts at zero and sees each gram rarely, so it learns faster than the transformer.
    """
    model.ngrams.count([*context.rows, *context.unlabelled])
    groups = [{"params": list(model.ngrams.parameters()), "lr_scale": 20.0}]
    hide = partial(token_dropout, rate=0.15)
    longer = replace(context, epochs=1.5 * context.epochs)
    return fit_labelled(longer, model, groups=groups, loss_fn=joint_loss, augment=hide)


def _fit(
    context: Context, model: nn.Module, batches: Any, tokens: int, loss_fn: LossFunction, stage: str, **options: Any
) -> None:
    settings = Settings(tokens, context.lr, "linear", precision=context.precision, log_every=20, save_every=10**9)
    folder = context.folder and context.folder / stage
    resume = folder is not None and bool(checkpoint.steps_in(folder))
    fit(model, batches, settings, loss_fn, folder=folder, resume=resume, meta=dict(context.meta), **options)


def _last(model: Model) -> list[nn.Module]:
    return [model.head, model.backbone.norm, model.backbone.layers[-1]]


_ALL = (
    Method("scratch", "no pretraining: the whole model learns from the labels alone", fit_labelled, pretrained=False),
    Method("full", "every weight of the pretrained model learns", fit_labelled),
    Method("head", "the pretrained model is frozen, only the new head learns", _thawed(lambda x: [x.head], FROZEN_LR)),
    Method("partial", "the last layer, the final norm and the head learn", _thawed(_last)),
    Method("gradual", "unfreezing from the head down, a layer a stage (Howard and Ruder 2018)", _gradual),
    Method("mix", "the head reads a learned mix of all layers (ELMo)", fit_labelled, partial(Classifier, mix=True)),
    Method("decay", "a lower layer learns 0.6 times as fast as the one above it", _decay),
    Method("shared", "one layer's weights serve all layers (ALBERT)", fit_labelled, share_layers=True),
    Method("lora", "low-rank updates of every projection (peft), merged at the end", _lora),
    Method(
        "adapters",
        "bottlenecks behind attention and feed-forward (Houlsby et al. 2019), norms and head learn",
        _thawed(lambda x: [x.head, *(part for part in x.modules() if isinstance(part, Bottleneck | nn.LayerNorm))]),
        _with_bottlenecks,
    ),
    Method("pseudo", "sure guesses on unlabelled texts become labels, two rounds", _pseudo, unlabelled=True),
    Method("gan", "a generator's features are one class more (GAN-BERT)", _gan, unlabelled=True),
    Method(
        "fgm",
        "each step also learns under an adversarial shift of the embeddings (Miyato et al. 2017)",
        partial(fit_labelled, backward=fgm_backward),
    ),
    Method("continued", "language modelling on the target's texts first, then everything learns", _continued),
    Method("clusters", "learn the k-means clusters of unlabelled texts first, then the labels", _clusters),
    Method("joint", "hashed character 1- to 3-grams add their logits to the transformer's", _joint, JointClassifier),
)
METHODS = {method.name: method for method in _ALL}
