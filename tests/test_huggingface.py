"""Models of Hugging Face transformers with our attention, norms and loss: what their eager selves compute, padding on
either side."""

import copy
import importlib
import importlib.util
import itertools
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")
from transformers import configuration_utils, masking_utils, modeling_utils  # noqa: E402

from tileformer.bench.check import models  # noqa: E402
from tileformer.decoder import huggingface, huggingface_loss  # noqa: E402
from tileformer.kernels import use_backend  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name, side", [(name, side) for name, sides in models.SIDES.items() for side in sides])
def test_logits_and_gradients(name: str, side: str) -> None:
    if name in models.DEEPTAB:
        pytest.importorskip("einops")
        pytest.importorskip("rotary_embedding_torch")
        if importlib.util.find_spec("deeptab") is None:
            pytest.skip("deeptab is not installed")
    ratios = models.errors_of(name, side, "torch", CPU)
    assert max(ratios.values()) <= 1.0, {key: x for key, x in ratios.items() if x > 1.0}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", models.GENERATE)
def test_generated_tokens(name: str, beams: int) -> None:
    assert models.same_tokens(name, beams, "torch", CPU)


def build(name: str):
    eager = models.eager(name)
    return eager, *models.ours(eager)


@pytest.mark.interprets
def test_the_kernels_serve_a_model() -> None:
    eager, ours, _ = build("GPT-2")
    given, kept = models.inputs_of(eager, "right")
    with use_backend("interpret"), torch.no_grad():
        torch.testing.assert_close(
            ours(**given).logits[kept.bool()], eager(**given).logits[kept.bool()], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_of_logits_in_half_precision(dtype) -> None:
    """Summed in float32: 20,000 losses do not fit float16, and would lose their last digits in bfloat16."""
    logits = torch.randn(1, 20_000, 50, dtype=dtype, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 50, (1, 20_000), generator=torch.Generator().manual_seed(1))
    expected = transformers.loss.loss_utils.ForCausalLMLoss
    for items in (None, 19_999, torch.tensor(19_999)):
        options = dict(labels=labels, vocab_size=50, num_items_in_batch=items)
        got = huggingface.causal_lm_loss(logits, **options)
        states = logits[..., :3].clone()
        states.tileformer_head = head = nn.Linear(3, 50, dtype=dtype)  # type: ignore[attr-defined]
        fused, of_states = huggingface.causal_lm_loss(states, **options), expected(head(states), **options)
        assert got.dtype == fused.dtype == torch.float32
        torch.testing.assert_close((got, fused), (expected(logits, **options), of_states), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_without_logits(dtype) -> None:
    eager = models.eager("Llama, grouped heads").to(dtype)
    ours = copy.deepcopy(eager)
    before = snapshot(ours)
    report = huggingface.use(ours, fused_loss=True)
    assert "linear_cross_entropy" in report.swapped["lm_head"] and not report.left
    assert huggingface.use(ours, fused_loss=True).left["lm_head"] == "it is fused with the loss already"
    given, kept = models.inputs_of(eager, "right")
    given |= dict(labels=given["input_ids"].masked_fill(kept == 0, -100), use_cache=False)
    shifted = dict(shift_labels=F.pad(given["labels"], (0, 1), value=-100)[:, 1:].contiguous())
    tolerance = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.05, atol=0.05)
    for model in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        for more in ({}, dict(num_items_in_batch=torch.tensor(7)), shifted, dict(return_dict=False)):
            got, expected = (x.train()(**given, **more) for x in (model, eager))
            assert got[0].dtype == torch.float32 and len(got) == len(expected) - 1  # no logits
            torch.testing.assert_close(got[0], expected[0], **tolerance)
            leaves = [list(x.parameters()) for x in (model, eager)]
            for a, b in zip(*map(torch.autograd.grad, (got[0], expected[0]), leaves), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=tolerance["atol"] * float(b.abs().max()))
        assert model(**given | dict(labels=None)).logits is not None and model.eval()(**given).logits is not None
    assert huggingface.revert(ours.eval()).swapped.keys() == report.swapped.keys()
    assert snapshot(ours) == before and ours.train()(**given).logits is not None


def test_a_loss_that_cannot_do_without_its_logits() -> None:
    capped = models.eager("Gemma 2, soft cap")
    huggingface.use(capped, fused_loss=True)
    given, _ = models.inputs_of(capped, "right")
    with pytest.raises(NotImplementedError, match="fused_loss=True a model may not change what its head gives"):
        capped.train()(**given, labels=given["input_ids"])
    assert capped.eval()(**given).logits.shape[-1] == capped.config.vocab_size
    square = models.eager("Llama, grouped heads")
    square.lm_head = nn.Linear(square.config.hidden_size, square.config.hidden_size)
    assert "an nn.Linear to another width" in huggingface.use(square, fused_loss=True).left["lm_head"]
    assert "not the loss of a causal" in str(huggingface.use(models.eager("DETR"), fused_loss=True).left)


def test_a_whole_model_can_be_saved(tmp_path) -> None:
    eager = models.eager("Llama, grouped heads")
    ours, *_ = models.ours(eager)
    torch.save(ours, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        given, _ = models.inputs_of(eager, "right")
        expected = ours(**given).logits
        torch.testing.assert_close(again(**given).logits, expected)
        for x in ours.parameters():
            x.zero_()
        torch.testing.assert_close(again(**given).logits, expected)  # its norms read its own weights


def test_the_loss_of_a_language_model() -> None:
    eager, ours, report = build("GPT-2")
    given, kept = models.inputs_of(eager, "right")
    labels = given["input_ids"].masked_fill(kept == 0, -100)
    for options in ({}, dict(num_items_in_batch=torch.tensor(11))):
        torch.testing.assert_close(
            ours(**given, labels=labels, **options).loss, eager(**given, labels=labels, **options).loss
        )
    assert "loss_function" in report.swapped


def test_a_model_with_attention_sinks_keeps_its_attention() -> None:
    sizes = dict(
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    model = transformers.GptOssForCausalLM(
        transformers.GptOssConfig(vocab_size=61, hidden_size=32, num_hidden_layers=1, **sizes)
    ).eval()
    ids = torch.randint(3, 61, (2, 9))
    expected = model(ids).logits
    report = huggingface.use(model)
    assert "GptOssAttention has attention sinks" in report.left["attention"] and "model.norm" in report.swapped
    torch.testing.assert_close(model(ids).logits, expected)


def test_lora_on_our_layers() -> None:
    peft = pytest.importorskip("peft")
    targets = ["self_attn", "multihead_attn", "linear1", "linear2"]
    found = []
    for convert in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
        if convert:
            huggingface.convert(net)
        net = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).double()
        torch.manual_seed(1)
        for name, x in net.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(x, std=0.3)
        source, target = torch.randn(2, 5, 16).double(), torch.randn(2, 4, 16).double()
        out = net(source, target)
        (out * torch.randn(out.shape)).sum().backward()
        found.append((out.detach(), {name: x.grad for name, x in net.named_parameters() if x.requires_grad}))
    (out, grads), (our_out, our_grads) = found
    torch.testing.assert_close(our_out, out)
    assert len(grads) == 20 and all(x is not None and x.any() for x in our_grads.values())
    torch.testing.assert_close(our_grads, grads)


class ToyConfig(configuration_utils.PreTrainedConfig):
    model_type = "toy"


class OwnAttention(nn.Module):
    """Adds the mask to scores in code of its own."""

    def forward(self, x, attention_mask=None):
        scores = torch.matmul(x, x.transpose(-1, -2))
        return torch.softmax(scores if attention_mask is None else scores + attention_mask[:, 0], -1) @ x


class AskingAttention(nn.Module):
    is_causal = True

    def __init__(self, config) -> None:
        super().__init__()
        self.config = config

    def forward(self, x, attention_mask=None):
        attend = modeling_utils.ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager)
        return attend(self, x[:, None], x[:, None], x[:, None], attention_mask, scaling=1.0)[0][:, :, 0]

    def eager(self, module, q, k, v, mask, **_):
        return ((q @ k.mT + mask).softmax(-1) @ v).transpose(1, 2), None


class ToyModel(modeling_utils.PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config, asks: bool = True) -> None:
        super().__init__(config)
        self.embed, self.own = nn.Embedding(61, 16), OwnAttention()
        self.asks = AskingAttention(config) if asks else None
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        mask = masking_utils.create_causal_mask(self.config, x, attention_mask, None)
        x = self.own(x, mask)
        return x if self.asks is None else self.asks(x, mask)


@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_attention_in_code_of_its_own_gets_a_mask_that_it_can_add(asks, padded) -> None:
    """Found by what the code does, not by its name or a flag: asked for by name alone, where nothing is reported,
    too."""
    ids, kept = torch.randint(3, 61, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    kept[1, 6:] = 0
    given = dict(input_ids=ids, attention_mask=kept if padded else None)
    toy = ToyModel._from_config(ToyConfig(), asks=asks, attn_implementation="eager").eval()
    expected = toy(**given)
    huggingface.register()
    named = copy.deepcopy(toy)
    named.config._attn_implementation = "tileformer"
    torch.testing.assert_close(named(**given)[kept.bool()], expected[kept.bool()])
    report = huggingface.use(toy)
    assert "ToyModel computes attention in its own code (OwnAttention)" in report.left["attention"]
    assert ("attention" in report.swapped) == asks == (toy.config._attn_implementation == "tileformer")
    torch.testing.assert_close(toy(**given)[kept.bool()], expected[kept.bool()])


def test_a_family_without_one_module_that_asks_says_so_once() -> None:
    sizes = dict(
        vocab_size=61, d_model=32, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=48, pad_token_id=1
    )
    config = transformers.TrOCRConfig(**sizes, cross_attention_hidden_size=32)
    ids = torch.randint(3, 61, (2, 9))
    huggingface.register()
    found = []
    for name in ("eager", "tileformer"):
        torch.manual_seed(0)
        model = transformers.TrOCRForCausalLM._from_config(copy.deepcopy(config), attn_implementation=name).eval()
        with (
            torch.no_grad(),
            nullcontext() if name == "eager" else pytest.warns(UserWarning, match="TrOCRAttention computes"),
        ):
            found.append(model(ids).logits)
    assert torch.equal(*found)
    assert "attention" not in huggingface.use(model).swapped


_NORMS = {"llama": "LlamaRMSNorm", "t5": "T5LayerNorm", "gemma": "GemmaRMSNorm"}


@pytest.mark.parametrize("family", _NORMS)
def test_a_norm_answers_in_the_dtype_in_which_theirs_answers(family) -> None:
    file = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    net = nn.Sequential(getattr(file, _NORMS[family])(16))
    nn.init.normal_(net[0].weight)
    expected, ours = copy.deepcopy(net), net
    huggingface.swap_norms(ours, report := huggingface.Report())
    assert list(report.swapped) == ["0"] and isinstance(ours[0], type(expected[0]))
    for weight, dtype in itertools.product((torch.float32, torch.float16, torch.bfloat16), repeat=2):
        x = torch.randn(3, 16).to(dtype)
        got, wanted = ours.to(weight)(x), expected.to(weight)(x)
        torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02)  # dtypes too
        assert ours[0](hidden_states=x).dtype == wanted.dtype
    replica = ours[0]._replicate_for_data_parallel()  # as DataParallel makes one for another device
    replica._parameters, replica.weight = {}, torch.full((16,), 3.0)
    torch.testing.assert_close(replica(torch.ones(2, 16)), torch.full((2, 16), 4.0 if family == "gemma" else 3.0))


class OddNorm(nn.Module):
    """As transformers writes a norm, but for one thing."""

    __module__ = "transformers.models.odd"

    def __init__(self, odd: str) -> None:
        super().__init__()
        self.weight, self.eps, self.odd = nn.Parameter(torch.ones(8)), 1e-2, odd
        if odd == "bias":
            self.bias = nn.Parameter(torch.zeros(8))
        if odd == "no eps":
            del self.eps

    def forward(self, x):
        if self.odd == "refuses" and x.dtype == torch.float16:
            raise ValueError("not in half")
        eps = {"eps": 1e-3, "no eps": 1e-6}.get(self.odd, 1e-2)
        y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        return (y * (self.weight.abs() if self.odd == "values" else self.weight)).to(x.dtype)


class OddGatedNorm(OddNorm):
    __module__ = "transformers.models.odd"

    def forward(self, x, gate=None):
        return super().forward(x if gate is None else x * gate)


_WHY = dict(
    bias="holds weight, bias", eps="something else", values="something else", refuses="not in half", gate="takes x, gate", replaced="replaced"
)  # fmt: skip
_WHY["no eps"] = "no number named eps"


@pytest.mark.parametrize("odd", _WHY)
def test_the_true_reason_why_a_norm_is_left(odd) -> None:
    """With values that would fit at this moment: weights of 1, biases of 0, no gate."""
    net = nn.Sequential(OddGatedNorm(odd) if odd == "gate" else OddNorm(odd))
    if odd == "replaced":
        net[0].forward = lambda x: x
    before = type(net[0])
    huggingface.swap_norms(net, report := huggingface.Report())
    assert _WHY[odd] in report.left["0"] and not report.swapped and type(net[0]) is before


_SMALL = dict(vocab_size=61, hidden_size=32, num_hidden_layers=1)
_MAMBA = dict(num_heads=8, head_dim=8, state_size=16, n_groups=1, chunk_size=8)


def test_a_model_with_gated_norms() -> None:
    torch.manual_seed(0)
    model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**_SMALL, **_MAMBA)).eval()
    ids = torch.randint(3, 61, (2, 9))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        report = huggingface.use(model)
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
    assert "gate" in report.left["backbone.layers.0.mixer.norm"] and "backbone.norm_f" in report.swapped
    assert "no module of Mamba2ForCausalLM asks" in report.left["attention"]


@pytest.mark.parametrize("name", ["T5", "mT5"])
def test_half_precision_with_a_layer_that_stays_in_float32(name) -> None:
    eager = models.eager(name).half()
    for module in eager.modules():
        if hasattr(module, "wo"):
            module.wo.float()  # as from_pretrained(dtype=torch.float16) leaves it
    ours, _ = models.ours(eager)
    given, _ = models.inputs_of(eager, "right")
    with torch.no_grad():
        torch.testing.assert_close(ours(**given).logits, eager(**given).logits, rtol=0.02, atol=0.03)


class Holder(nn.Module):
    """As DDP, or a user's own model around two of transformers."""

    def __init__(self, *parts) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, **given):
        return self.parts[0](**given)


def peft_of(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


WRAPPERS = {
    "peft": peft_of,
    "DataParallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager", fullgraph=True),
    "holder": Holder,
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("wrapper", WRAPPERS)
@torch.no_grad()
def test_what_a_wrapper_holds_is_what_runs(wrapper, monkeypatch) -> None:
    eager = models.eager("Llama, grouped heads")
    given, kept = models.inputs_of(eager, "right")
    given |= dict(labels=given["input_ids"].masked_fill(kept == 0, -100), use_cache=False)
    del eager.model.layers[1]  # compiles sooner
    inner = copy.deepcopy(eager)
    net, expected = WRAPPERS[wrapper](inner), eager(**given)
    report = huggingface.use(net)
    assert {"attention", "loss_function"} <= report.swapped.keys() and not report.left
    calls = []

    def counted(module, name, function):
        def call(*args, **options):
            calls.append(name)
            return function(*args, **options)

        monkeypatch.setattr(module, name, call)

    for module, name in ((huggingface, "attention"), (huggingface_loss, "cross_entropy"), (huggingface, "rms_norm")):
        counted(module, name, getattr(module, name))
    got = net(**given)
    assert sorted(calls) == ["attention", "cross_entropy", *3 * ["rms_norm"]]
    torch.testing.assert_close(got.loss, expected.loss)
    assert huggingface.revert(net).swapped.keys() == report.swapped.keys()
    assert "_loss_function" not in vars(inner) and inner.config._attn_implementation == "eager"
    assert torch.equal(inner(**given).logits, expected.logits) and len(calls) == 5


def test_two_models_in_one_and_none() -> None:
    pair = Holder(models.eager("GPT-2"), models.eager("OPT"))
    report = huggingface.use(pair)
    assert {"parts.0.attention", "parts.1.attention", "parts.1.loss_function"} <= report.swapped.keys()
    assert huggingface.revert(pair).swapped.keys() == report.swapped.keys()
    for function in (huggingface.use, huggingface.revert):
        with pytest.raises(TypeError, match="a model of transformers.*got Linear.*convert"):
            function(nn.Linear(2, 2))


def snapshot(model) -> dict:
    """Class, attributes and their values of every module, and what each configuration says."""
    own = {
        name: (
            type(module),
            {
                key: x if isinstance(x, (bool, int, float, str, type(None))) else id(x)
                for key, x in vars(module).items()
            },
        )
        for name, module in model.named_modules()
    }
    configs = {
        key: {**config.to_dict(), "attention": config._attn_implementation}
        for key, config in huggingface._configs(model).items()
    }
    return own | configs


@pytest.mark.parametrize("name", ["GPT-2", "Llama, grouped heads", "T5", "DETR"])
def test_revert_leaves_nothing_behind(name) -> None:
    eager = models.eager(name)
    ours = copy.deepcopy(eager)
    if name == "T5":
        ours.encoder.config._attn_implementation = "sdpa"  # parts that differ are given back as they were
    before = snapshot(ours)
    report = huggingface.use(ours)
    again = huggingface.use(ours)
    assert not again.swapped and again.left["attention"] == "it is tileformer's already"
    copies = copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))
    assert huggingface.revert(ours).swapped.keys() == report.swapped.keys()
    assert snapshot(ours) == before and not huggingface.revert(ours).swapped
    given, _ = models.inputs_of(eager, "right")
    with torch.no_grad():
        expected = ours(**given).logits
        for x in copies:
            torch.testing.assert_close(x(**given).logits, expected, rtol=1e-4, atol=1e-4)
            huggingface.revert(x)
            assert torch.equal(x(**given).logits, expected)
            assert [type(module) for module in x.modules()] == [type(module) for module in eager.modules()]


def test_revert_keeps_what_was_chosen_since() -> None:
    model = models.eager("GPT-2")
    huggingface.use(model)
    model.set_attn_implementation("sdpa")
    model.loss_function = sum
    huggingface.revert(model)
    assert model.config._attn_implementation == "sdpa" and model.loss_function is sum
    huggingface.register()
    model.set_attn_implementation("tileformer")
    assert "asked for by name" in huggingface.revert(model).left["attention"]


def test_a_model_whose_weights_are_not_there_yet() -> None:
    eager = models.eager("Llama, grouped heads")
    with torch.device("meta"):
        ours = type(eager)(eager.config)
        report = huggingface.use(ours)
    assert not report.left and "model.norm" in report.swapped
    ours.load_state_dict(eager.state_dict(), assign=True)
    ours.model.rotary_emb = copy.deepcopy(eager.model.rotary_emb)
    given, _ = models.inputs_of(eager, "right")
    torch.testing.assert_close(ours.eval()(**given).logits, eager(**given).logits)


@pytest.mark.parametrize(
    "name, norm", [("Gemma 2, soft cap", "Gemma2RMSNorm"), ("Llama, grouped heads", "LlamaRMSNorm")]
)
def test_the_norms_of_a_model_are_swapped(name, norm) -> None:
    _, _, report = build(name)
    assert sum(norm in said for said in report.swapped.values()) > 2
    assert not any(norm in why for why in report.left.values())
