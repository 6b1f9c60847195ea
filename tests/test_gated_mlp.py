"""huggingface.use on gated feed-forward blocks: which are swapped, that they compute the same, and on a CPU the very same."""

import copy

import pytest
import torch
from torch import nn

from tileformer.decoder import gated_mlp, huggingface
from tileformer.kernels import use_backend

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
MODELS = {
    "Llama": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)), "silu"),
    "Mistral": (lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES)), "silu"),
    "Qwen2": (lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)), "silu"),
    "Gemma": (lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**SIZES, head_dim=16)), "gelu_tanh"),
    "exact gelu": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, hidden_act="gelu")), "gelu"),
}


@pytest.mark.interprets
@pytest.mark.parametrize("make, activation", MODELS.values(), ids=MODELS)
def test_logits_and_gradients_stay(make, activation):
    torch.manual_seed(0)
    model = make()
    theirs, ids = copy.deepcopy(model), torch.randint(3, 61, (2, 7))
    report = huggingface.use(model)
    blocks = [name for name in report.swapped if name.endswith(".mlp")]
    assert len(blocks) == 2 and "bias_activation_dropout" in report.swapped[blocks[0]]
    assert all(model.get_submodule(name)._tileformer_activation == activation for name in blocks)
    expected = theirs(ids).logits
    expected.sum().backward()
    for backend in ("interpret", "auto"):
        model.zero_grad()
        with use_backend(backend):
            logits = model(ids).logits
        logits.sum().backward()
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        for name in ("gate_proj", "up_proj", "down_proj"):
            got, wanted = (m.model.layers[0].mlp.get_submodule(name).weight.grad for m in (model, theirs))
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    huggingface.revert(model)
    block = model.get_submodule(blocks[0])
    assert type(block) is type(theirs.get_submodule(blocks[0])) and not hasattr(block, "_tileformer_activation")


def test_on_a_cpu_the_block_itself_computes(monkeypatch):
    block = nn.Sequential(transformers.models.llama.modeling_llama.LlamaMLP(transformers.LlamaConfig(**SIZES)))
    x = torch.randn(3, 32)
    expected = block(x)
    gated_mlp.swap_gated_mlps(block, huggingface.Report())
    with monkeypatch.context() as patch:
        patch.setattr(gated_mlp, "bias_activation_dropout", None)
        assert torch.equal(block(x), expected)
    calls = []
    monkeypatch.setattr(gated_mlp, "bias_activation_dropout", lambda gate, *how, up: calls.append(how) or gate * up)
    with use_backend("interpret"):
        block(x)
    assert calls == [("silu",)]


class OddMLP(nn.Module):
    """As transformers writes a block, but for one thing."""

    __module__ = "transformers.models.odd"

    def __init__(self, odd):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.act_fn, self.odd = nn.Mish() if odd == "activation" else nn.SiLU(), odd

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.odd == "swapped":
            gate, up = up, gate
        y = self.act_fn(gate) * up
        y = y.to(self.down_proj.weight.dtype) if self.odd == "asks for more" else y
        return self.down_proj(y) + (x if self.odd == "residual" else 0.0)


@pytest.mark.parametrize("odd", ["activation", "swapped", "asks for more", "residual", "replaced"])
def test_what_computes_something_else_is_left(odd):
    net = nn.Sequential(OddMLP(odd))
    if odd == "replaced":
        net[0].forward = lambda x: x
    gated_mlp.swap_gated_mlps(net, report := huggingface.Report())
    assert type(net[0]) is OddMLP and "something else" in report.left["0"] and not report.swapped
    gated_mlp.swap_gated_mlps(like := nn.Sequential(OddMLP("")), report := huggingface.Report())
    assert isinstance(like[0], gated_mlp.GatedMLP) and list(report.swapped) == ["0"]
