"""Every fine-tuning method learns, repeats by its seed, and trains exactly the weights it names."""

import copy
import random
from dataclasses import replace

import pytest
import torch

from tileformer.decoder import Classifier, DecoderLM, DecoderLMConfig
from tileformer.decoder.blocks import Attention
from tileformer.training.data.batches import LabelledBatches
from tileformer.training.finetune import adversarial, methods, ngrams
from tileformer.training.finetune.methods import METHODS, Context
from tileformer.training.losses import classification_loss

pytest.importorskip("peft")
pytest.importorskip("sklearn")

CONFIG = DecoderLMConfig(30, d_model=16, nhead=2, num_layers=2, dim_feedforward=32, dropout=0.1, max_length=16)


def make_rows(count, seed):
    """Rows whose class is whether 10 or 11 stands somewhere in them."""
    dice = random.Random(seed)
    rows, labels = [], []
    for number in range(count):
        row = [1, *(dice.randrange(12, 30) for _ in range(dice.randrange(4, 12)))]
        row[dice.randrange(1, len(row))] = 10 + number % 2
        rows.append(row)
        labels.append(number % 2)
    return rows, labels


@pytest.fixture(scope="module")
def context():
    torch.manual_seed(7)
    rows, labels = make_rows(40, 0)
    unlabelled, _ = make_rows(60, 1)
    weights = DecoderLM(CONFIG).state_dict()
    return Context(CONFIG, weights, rows, labels, unlabelled, 2, epochs=16, batch_size=20, lr=1e-2, precision="fp32")


@pytest.fixture(scope="module")
def trained(context):
    """Each method's model, once."""
    return {name: method.run(context) for name, method in METHODS.items()}


def changed(model, context):
    """Names of the language model's tensors that are not the pretrained ones, found under the same name."""
    state = model.backbone.state_dict()
    return {name for name, old in context.weights.items() if name in state and not torch.equal(state[name], old)}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_learns_and_ends_in_eval_mode(name, context, trained):
    model = trained[name]
    rows, labels = make_rows(100, 2)
    right = (methods.probabilities(model, rows).argmax(1) == torch.tensor(labels)).float().mean()
    assert right >= 0.65, right  # 40 labels of a random pretrained model; chance is 0.50 with an error of 0.05
    assert isinstance(model, Classifier) and not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["full", "lora", "pseudo", "gan", "continued", "clusters"])
def test_a_run_repeats_by_its_seed(name, context, trained):
    again = METHODS[name].run(context).state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in trained[name].state_dict().items())


def test_a_saved_model_is_built_again_by_its_method(context, trained):
    rows, _ = make_rows(5, 3)
    for name, model in trained.items():
        other = METHODS[name].make(CONFIG, 2).eval()
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(methods.probabilities(other, rows), methods.probabilities(model, rows))


# What learns and what holds still


@pytest.mark.parametrize(
    "name, learns",
    [
        ("head", lambda key: False),
        ("partial", lambda key: key.startswith(("layers.1.", "norm."))),
        ("lora", lambda key: "weight" in key and ("self_attn" in key or "linear" in key)),
        ("adapters", lambda key: "norm" in key),
        ("full", lambda key: True),
        ("gradual", lambda key: True),
        ("decay", lambda key: True),
        ("mix", lambda key: True),
        ("fgm", lambda key: True),
        ("joint", lambda key: True),
        ("scratch", lambda key: True),
    ],
)
def test_only_the_named_weights_learn(name, learns, context, trained):
    found = changed(trained[name], context)
    # Wrapped by an adapter, a projection has another name: those are held in the test below.
    assert found == {key for key in context.weights if key in trained[name].backbone.state_dict() and learns(key)}


def test_lora_reaches_every_projection_and_leaves_plain_modules(context, trained):
    model = trained["lora"]
    for layer in model.backbone.layers:
        assert type(layer.self_attn) is Attention and type(layer.linear1) is torch.nn.Linear
    for part in ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"):
        for number in range(2):
            name = f"layers.{number}.{part}"
            update = model.backbone.state_dict()[name] - context.weights[name]
            assert torch.linalg.matrix_rank(update, rtol=1e-3) <= 8 and update.abs().max() > 1e-4, name


def test_adapters_hold_the_projections_still(context, trained):
    state = trained["adapters"].backbone.state_dict()
    for number in range(2):
        for part in ("self_attn.out_proj", "linear2"):
            assert torch.equal(
                state[f"layers.{number}.{part}.0.weight"], context.weights[f"layers.{number}.{part}.weight"]
            )
            assert state[f"layers.{number}.{part}.1.up.weight"].any()
    fresh, _ = METHODS["adapters"].start(context)
    rows, _ = make_rows(4, 4)
    plain = Classifier(DecoderLM(CONFIG), 2)
    plain.backbone.load_state_dict(context.weights)
    torch.testing.assert_close(
        methods.predict_batched(fresh.features, fresh, rows), methods.predict_batched(plain.features, plain, rows)
    )  # adapters start as the identity


def test_shared_layers_are_one(trained, context):
    assert len(trained["shared"].backbone.layers) == 1
    model, report = METHODS["shared"].start(context)
    assert {name for name in report.skipped if name.startswith("layers.1.")} == {
        name for name in context.weights if name.startswith("layers.1.")
    }
    assert torch.equal(model.backbone.layers[0].linear1.weight, context.weights["layers.0.linear1.weight"])


def test_decay_lowers_the_rate_towards_the_embeddings(context, monkeypatch):
    seen = {}
    monkeypatch.setattr(methods, "fit_labelled", lambda context, model, **options: seen.update(options) or model)
    model, _ = METHODS["decay"].start(context)
    METHODS["decay"].learn(context, model)
    scales = {id(p): group["lr_scale"] for group in seen["groups"] for p in group["params"]}
    backbone = model.backbone
    found = [scales[id(p)] for p in (backbone.embedding.weight, backbone.layers[0].linear1.weight)]
    assert found == pytest.approx([0.6**3, 0.6**2])
    assert scales[id(backbone.layers[1].linear1.weight)] == pytest.approx(0.6)
    assert id(model.head.linear.weight) not in scales  # the full rate


def test_gradual_frees_a_layer_a_stage(context, monkeypatch):
    stages = []

    def record(context, model, epochs, stage):
        free = {name.split(".")[0] for name, p in model.backbone.named_parameters() if p.requires_grad}
        layers = {
            name.split(".")[1] for name, p in model.backbone.layers.named_parameters(prefix="l") if p.requires_grad
        }
        stages.append((free, layers, epochs))

    monkeypatch.setattr(methods, "fit_labelled", record)
    model, _ = METHODS["gradual"].start(context)
    METHODS["gradual"].learn(context, model)
    norm, everything = {"norm"}, {"embedding", "position", "layers", "norm"}
    assert [free for free, _, _ in stages] == [norm, norm | {"layers"}, everything]
    assert [layers for _, layers, _ in stages] == [set(), {"1"}, {"0", "1"}]
    assert sum(epochs for _, _, epochs in stages) == pytest.approx(context.epochs)


# Unlabelled texts


def test_pseudo_labels_are_sure_balanced_and_new_each_round(context, monkeypatch):
    calls = []
    monkeypatch.setattr(
        methods,
        "fit_labelled",
        lambda context, model, rows=None, labels=None, **options: calls.append((rows, labels)) or model,
    )
    # Of the 60 unlabelled, guess 0 for 40 with rising certainty and 1 for 20; labels are 3 : 1.
    shares = torch.cat([torch.linspace(0.5, 0.99, 40), torch.linspace(0.45, 0.01, 20)])
    monkeypatch.setattr(methods, "probabilities", lambda model, rows: torch.stack([shares, 1 - shares], 1))
    model, _ = METHODS["pseudo"].start(context)
    labels = [0, 0, 0, 1] * 10
    METHODS["pseudo"].learn(Context(**vars(context) | {"labels": labels}), model)
    assert calls[0] == (None, None) and len(calls) == 3
    rows, found = calls[1]
    added = found[40:]
    sure = int((shares >= 0.9).sum()), int((1 - shares >= 0.9).sum())
    assert added.count(0) <= sure[0] and added.count(1) <= sure[1] and len(rows) == len(found)
    assert added.count(0) == pytest.approx(3 * added.count(1), abs=3) and added.count(0) == sure[0]
    some = context.some_unlabelled()
    assert rows[40] == some[39]  # the surest of its class first


def test_methods_that_need_texts_without_labels_say_so(context):
    bare = Context(**vars(context) | {"unlabelled": []})
    for method in METHODS.values():
        if method.unlabelled:
            with pytest.raises(ValueError, match="needs texts without labels"):
                method.run(bare)
    bare = Context(**vars(context) | {"weights": None})
    with pytest.raises(ValueError, match="lora starts from a pretrained model.*tileformer train reviews"):
        METHODS["lora"].run(bare)


def test_clusters_and_continued_read_the_unlabelled_texts(context, monkeypatch):
    seen = []
    fit = methods.fit

    def record(model, batches, settings, loss_fn, **options):
        seen.append((type(model).__name__, type(batches).__name__, settings.tokens))
        return fit(model, batches, settings, loss_fn, **options)

    monkeypatch.setattr(methods, "fit", record)
    for name in ("continued", "clusters"):
        METHODS[name].run(context)
    texts = sum(len(row) - 1 for row in (*context.rows, *context.unlabelled))
    assert seen[0] == ("DecoderLM", "PackedBatches", texts)
    assert seen[2] == ("Classifier", "LabelledBatches", texts + 100)
    assert seen[1] == seen[3] == ("Classifier", "LabelledBatches", 16 * sum(map(len, context.rows)))


@pytest.mark.parametrize("name, stages", [("gradual", 3), ("pseudo", 3), ("clusters", 2), ("continued", 2)])
def test_stages_of_a_stopped_run_are_gone_on_with(name, stages, context, tmp_path, monkeypatch):
    """Stopped in the last stage: the ones before it are not trained again, and the weights are those of one go."""
    short = replace(context, epochs=4, folder=tmp_path / "whole", meta={"seed": 0})
    whole = METHODS[name].run(short).state_dict()
    fit, calls, steps = methods.fit, [], []

    def counted(model, batches, settings, loss_fn, **options):
        def counting(model, batch):
            steps.append(1)
            if len(calls) == stages and len(steps) == 2:
                raise KeyboardInterrupt
            return loss_fn(model, batch)

        calls.append(1)
        steps.clear()
        return fit(model, batches, settings, counting, **options)

    monkeypatch.setattr(methods, "fit", counted)
    with pytest.raises(KeyboardInterrupt):
        METHODS[name].run(replace(short, folder=tmp_path / "run"))
    calls.clear()
    trained = []
    monkeypatch.setattr(methods, "fit", lambda *a, **b: trained.append(fit(*a, **b).core_seconds))
    again = METHODS[name].run(replace(short, folder=tmp_path / "run")).state_dict()
    assert len(trained) == stages and all(torch.equal(again[key], tensor) for key, tensor in whole.items())


# Adversaries


def make_batch(context, weights=None):
    return next(iter(LabelledBatches(context.rows, context.labels, 8, seed=0, weights=weights)))


def test_fgm_adds_the_gradient_of_the_shifted_embedding(context):
    torch.manual_seed(0)
    model = Classifier(DecoderLM(CONFIG), 2).eval()
    batch, scale = make_batch(context), torch.tensor(0.5)
    before = copy.deepcopy(model.state_dict())
    loss = adversarial.fgm_backward(model, batch, classification_loss, scale)
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    model.zero_grad()
    plain = classification_loss(model, batch)
    plain.backward()
    gradient = model.backbone.embedding.weight.grad.clone()
    with torch.no_grad():
        model.backbone.embedding.weight += gradient / gradient.norm()
    shifted = classification_loss(model, batch)
    shifted.backward()
    assert shifted > plain  # uphill
    torch.testing.assert_close(loss, plain)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad * 0.5, rtol=1e-4, atol=1e-6)


def test_gan_gives_each_player_its_own_loss(context):
    torch.manual_seed(0)
    gan = adversarial.Gan(Classifier(DecoderLM(CONFIG), 2)).eval()
    batch, scale = make_batch(context, [1.0, 0.0] * 20), torch.tensor(2.0)
    torch.manual_seed(1)
    adversarial.gan_backward(gan, batch, adversarial.gan_loss, scale)
    found = {name: parameter.grad.clone() for name, parameter in gan.named_parameters()}
    for place in range(2):
        gan.zero_grad()
        torch.manual_seed(1)
        gan.loss(batch)[place].backward()
        for name, parameter in gan.named_parameters():
            if name.startswith("generator") == (place == 1):
                torch.testing.assert_close(found[name], 2 * parameter.grad, msg=name)


def test_the_losses_of_a_gan_are_those_of_one_more_class(context):
    torch.manual_seed(0)
    gan = adversarial.Gan(Classifier(DecoderLM(CONFIG), 2)).eval()
    batch = make_batch(context, [1.0, 0.0, 0.5, 0.0] * 10)

    def shares(features):
        return torch.cat([gan.classifier.head(features), gan.fake(features)], 1).softmax(1)  # real classes, fake

    torch.manual_seed(1)
    discriminator, generator = gan.loss(batch)
    torch.manual_seed(1)
    real = gan.classifier.features(batch.source)
    made = gan.generate(real)
    known = batch.weights > 0
    own = gan.classifier.head(real)[known].log_softmax(1)
    named = -own[range(int(known.sum())), batch.labels[known]].mean()
    told = -(1 - shares(real)[:, 2]).log().mean() - shares(made)[:, 2].log().mean()
    torch.testing.assert_close(discriminator, named + told)
    deceived = -(1 - shares(made)[:, 2]).log().mean()
    torch.testing.assert_close(generator, deceived + (real.mean(0) - made.mean(0)).square().mean())
    generator.backward()
    assert all(p.grad is None for p in gan.classifier.backbone.parameters())


def test_the_steps_of_a_gan_add_up(context):
    torch.manual_seed(0)
    gan = adversarial.Gan(Classifier(DecoderLM(CONFIG), 2)).eval()
    batch, found = make_batch(context, [1.0, 0.0] * 20), []
    for _ in range(2):
        torch.manual_seed(1)
        loss = adversarial.gan_backward(gan, batch, adversarial.gan_loss, torch.tensor(2.0))
        found.append({name: parameter.grad.clone() for name, parameter in gan.named_parameters()})
    torch.manual_seed(1)
    torch.testing.assert_close(loss, gan.loss(batch)[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], 2 * gradient, msg=name)


def test_gan_learns_no_class_from_rows_without_a_label(context):
    gan = adversarial.Gan(Classifier(DecoderLM(CONFIG), 2)).eval()
    losses = []
    for flip in (0, 1):
        labels = [1 - label if number % 2 and flip else label for number, label in enumerate(context.labels)]
        batch = next(iter(LabelledBatches(context.rows, labels, 8, weights=[1.0, 0.0] * 20)))
        torch.manual_seed(1)
        losses.append(gan.loss(batch)[0])
    assert torch.equal(*losses)


# N-grams


def test_grams_do_not_see_padding_and_know_order():
    model = ngrams.NgramClassifier(2, buckets=1 << 16)
    torch.nn.init.normal_(model.table.weight)
    alone = model(torch.tensor([[1, 5, 6, 7]]))
    padded = model(torch.tensor([[1, 5, 6, 7, 0, 0], [1, 5, 6, 7, 8, 9]]))
    torch.testing.assert_close(padded[:1], alone)
    assert not torch.allclose(padded[1], alone[0]) and not torch.allclose(model(torch.tensor([[1, 6, 5, 7]])), alone)
    grams = model.grams(torch.tensor([[1, 5, 6, 7, 0]]))
    assert (grams != 0).sum() == 4 + 3 + 2 and grams.unique().numel() == 10
    assert not model(torch.zeros(1, 3, dtype=torch.int64)).isnan().any()


def test_a_bucket_is_of_a_gram_in_its_order_and_never_paddings():
    model = ngrams.NgramClassifier(2, longest=2, buckets=4, pad_id=9)
    found = model.grams(torch.arange(1, 60)[torch.arange(1, 60) != 9][:, None])[:, 0]
    assert found.unique().tolist() == [1, 2, 3]
    wide = ngrams.NgramClassifier(2, longest=2, buckets=1 << 16)
    first, second = (wide.grams(torch.tensor([row])) for row in ([5, 6], [6, 5]))
    assert first[0, 2] != second[0, 2] and first[0, 0] == second[0, 1]
    with torch.no_grad():
        model.bias.copy_(torch.tensor([1.0, -2.0]))
    torch.testing.assert_close(model(torch.tensor([[3, 9]])), model.bias[None])  # the table starts at 0


def test_joint_grams_know_the_models_padding():
    model = METHODS["joint"].make(replace(CONFIG, pad_id=7), 2)
    assert model.ngrams.pad_id == 7 and not model.ngrams.grams(torch.tensor([[7, 7]])).any()


def test_the_weights_of_a_text_are_its_idf_of_length_one():
    model = ngrams.NgramClassifier(1, longest=1, buckets=1 << 16)
    model.count([[5, 6, 8], [5, 6], [5, 5]])
    torch.nn.init.ones_(model.table.weight)
    rare, common = torch.tensor(4 / 3).log() + 1, torch.tensor(4 / 4).log() + 1
    expected = (rare + common) / (rare**2 + common**2) ** 0.5
    # One text alone has 8, and none has 9.
    torch.testing.assert_close(model(torch.tensor([[5, 6], [8, 9]])), torch.stack([expected, expected * 0])[:, None])


def test_the_joint_loss_teaches_each_branch_and_the_sum_predicts(context):
    torch.manual_seed(0)
    model = METHODS["joint"].make(CONFIG, 2).eval()
    torch.nn.init.normal_(model.ngrams.table.weight)
    batch = make_batch(context)
    read, counted = Classifier.forward(model, batch.source), model.ngrams(batch.source)
    loss = torch.nn.functional.cross_entropy
    expected = (loss(read, batch.labels) + loss(counted, batch.labels)) / 2
    torch.testing.assert_close(ngrams.joint_loss(model, batch), expected)
    torch.testing.assert_close(model(batch.source), read + counted)
