"""Our modules compute what torch.nn's compute: outputs, weights and every gradient, for every constructor and mask.

The verdict is the error budget of `tileformer.bench.check.budget`.
"""

import copy

import pytest
import torch
from torch import nn

from tileformer import decoder
from tileformer.bench.check.budget import assert_within_budget

# torch's own remarks about its fast path and about masks of two types; ours make none.
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:Support for mismatched")

# Small and uneven, so that a swapped axis cannot pass: batch, queries, keys, heads, width.
B, T_Q, T_K, H, C = 3, 5, 7, 2, 12


def inputs(shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def run(module, tensors, dtype, call):
    """Outputs of `call`, then the gradients of all inputs and parameters."""
    module = copy.deepcopy(module).to(dtype)
    tensors = [x.to(dtype).requires_grad_() for x in tensors]
    outputs = [x for x in call(module, *tensors) if x is not None]
    weights = inputs([x.shape for x in outputs])
    loss = sum((x * w.to(dtype)).sum() for x, w in zip(outputs, weights, strict=True))
    grads = torch.autograd.grad(loss, tensors + list(module.parameters()))
    return [x.detach() for x in (*outputs, *grads)]


def assert_equals_torch(theirs, ours, tensors, call, their_call=None):
    """`call(module, *tensors)` and every gradient: torch's module in float64 is the truth, in float32 the yardstick."""
    their_call = their_call or call
    truth = run(theirs, tensors, torch.float64, their_call)
    eager = run(theirs, tensors, torch.float32, their_call)
    got = run(ours, tensors, torch.float32, call)
    for i, (g, e, t) in enumerate(zip(got, eager, truth, strict=True)):
        assert_within_budget(f"result {i}", g, e, t)


def twins(name, *args, **kwargs):
    """torch's module and ours with the same weights, none of them at its initial 0 or 1."""
    theirs, ours = getattr(nn, name)(*args, **kwargs), getattr(decoder, name)(*args, **kwargs)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def mask(kind, shape, dtype):
    """True or -inf where hidden, never a whole row: torch does not agree with itself there (test_decoder_modules)."""
    hidden = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.4
    hidden[..., 0] = False
    if kind == "bool":
        return hidden
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return noise.masked_fill(hidden, float("-inf")).to(dtype)


MODULES = {
    "self": {},
    "self, time first": {"batch_first": False},
    "self, no bias": {"bias": False},
    "memory": {},
    "memory, time first": {"batch_first": False},
    "query and key in one": {},
    "three inputs": {},
    "three inputs, no bias": {"bias": False},
    "kdim, vdim": {"kdim": 10, "vdim": 8},
    "kdim, vdim, no bias, time first": {"kdim": 10, "vdim": 8, "bias": False, "batch_first": False},
    "memory, bias_kv": {"add_bias_kv": True},
    "memory, zero_attn": {"add_zero_attn": True},
    "self, bias_kv, zero_attn, time first": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": False},
    "memory, no batch": {},
    "self, no batch, time first": {"batch_first": False},
}
# (attn_mask kind and rank, key_padding_mask kind)
MASKS = [
    (None, None),
    (("bool", 2), None),
    (("float", 2), None),
    (("bool", 3), "bool"),
    (("float", 3), "float"),
    (None, "bool"),
    (None, "float"),
    (("bool", 2), "float"),
    (("float", 2), "bool"),
]


def attention_inputs(name, options):
    """Tensors and how they enter the module: one, two or three, with time where the module expects it."""
    batched, time_first = "no batch" not in name, not options.get("batch_first", True)
    t_k = T_Q if name.startswith(("self", "query and key")) else T_K

    def shape(time, width):
        if not batched:
            return (time, width)
        return (time, B, width) if time_first else (B, time, width)

    shapes = [shape(T_Q, C), shape(t_k, options.get("kdim", C)), shape(t_k, options.get("vdim", C))]
    if name.startswith("self"):
        return inputs(shapes[:1]), lambda x: (x, x, x), t_k
    if name.startswith("memory"):
        return inputs(shapes[:2]), lambda x, memory: (x, memory, memory), t_k
    if name.startswith("query and key"):
        return inputs(shapes[::2]), lambda x, value: (x, x, value), t_k
    return inputs(shapes), lambda *qkv: qkv, t_k


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("masks", MASKS, ids=lambda masks: f"{masks[0]}-{masks[1]}")
def test_attention_equals_torch(name, masks):
    options = {"batch_first": True, **MODULES[name]}
    tensors, arrange, t_k = attention_inputs(name, options)
    theirs, ours = twins("MultiheadAttention", C, H, **options)
    batch = 1 if "no batch" in name else B
    attn, padding = masks
    attn_shape = None if attn is None else ((T_Q, t_k) if attn[1] == 2 else (batch * H, T_Q, t_k))
    padding_shape = (t_k,) if "no batch" in name else (B, t_k)

    def call(module, *tensors, weights):
        dtype = tensors[0].dtype
        return module(
            *arrange(*tensors),
            attn_mask=None if attn is None else mask(attn[0], attn_shape, dtype),
            key_padding_mask=None if padding is None else mask(padding, padding_shape, dtype),
            **weights,
        )

    for weights in ({"need_weights": False}, {}, {"average_attn_weights": False}):
        assert_equals_torch(theirs, ours, tensors, lambda *a, w=weights: call(*a, weights=w))


@pytest.mark.parametrize("padding", [None, "bool", "float"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_is_causal_promises_that_the_mask_is_causal(padding, need_weights):
    theirs, ours = twins("MultiheadAttention", C, H, batch_first=True)
    causal = torch.ones(T_Q, T_Q, dtype=torch.bool).triu(1)

    def call(module, x):
        keys = None if padding is None else mask(padding, (B, T_Q), x.dtype)
        return module(x, x, x, attn_mask=causal, is_causal=True, key_padding_mask=keys, need_weights=need_weights)

    assert_equals_torch(theirs, ours, inputs([(B, T_Q, C)]), call)


def test_appended_keys_stay_visible_under_a_causal_mask():
    """torch loses them with is_causal=True and need_weights=False; its other path, which keeps them, is the truth."""
    theirs, ours = twins("MultiheadAttention", C, H, add_bias_kv=True, add_zero_attn=True)
    causal = torch.ones(T_Q, T_Q, dtype=torch.bool).triu(1)

    def call(module, x, **hint):
        return module(x, x, x, attn_mask=causal, need_weights=False, **hint)

    tensors = inputs([(T_Q, B, C)])
    assert_equals_torch(theirs, ours, tensors, lambda m, x: call(m, x, is_causal=True), their_call=call)


# The constructor arguments that change what is computed: each value of each appears; their product would not say more.
LAYERS = [
    {"batch_first": True, "norm_first": True, "activation": "gelu"},
    {"batch_first": True, "norm_first": False, "activation": "relu"},
    {"batch_first": False, "norm_first": True, "activation": nn.functional.silu},
    {"batch_first": False, "norm_first": False, "bias": False},
    {"batch_first": True, "norm_first": True, "layer_norm_eps": 1e-2, "bias": False},
]


def layer_id(options):
    return ", ".join(f"{k}={getattr(v, '__name__', v)}" for k, v in options.items())


def layer_inputs(options, batched=True):
    shapes = [(B, T_Q, C), (B, T_K, C)] if options.get("batch_first") else [(T_Q, B, C), (T_K, B, C)]
    return inputs(shapes if batched else [(T_Q, C), (T_K, C)])


def decoder_masks(dtype, kind="bool", batched=True):
    rows = (B,) if batched else ()
    return {
        "tgt_mask": torch.ones(T_Q, T_Q, dtype=torch.bool).triu(1) if kind == "bool" else mask(kind, (T_Q, T_Q), dtype),
        "memory_mask": mask(kind, (T_Q, T_K), dtype),
        "tgt_key_padding_mask": mask(kind, (*rows, T_Q), dtype),
        "memory_key_padding_mask": mask(kind, (*rows, T_K), dtype),
    }


@pytest.mark.parametrize("options", LAYERS, ids=layer_id)
def test_encoder_layer_equals_torch(options):
    theirs, ours = twins("TransformerEncoderLayer", C, H, 16, 0.0, **options)
    src, _ = layer_inputs(options)

    def call(module, x):
        return [module(x, mask("bool", (T_Q, T_Q), x.dtype), mask("bool", (B, T_Q), x.dtype))]

    assert_equals_torch(theirs, ours, [src], call)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("options", LAYERS, ids=layer_id)
def test_decoder_layer_equals_torch(options, kind):
    theirs, ours = twins("TransformerDecoderLayer", C, H, 16, 0.0, **options)
    for batched in (True, False):
        assert_equals_torch(
            theirs,
            ours,
            layer_inputs(options, batched),
            lambda m, x, memory, batched=batched: [m(x, memory, **decoder_masks(x.dtype, kind, batched))],
        )


@pytest.mark.parametrize("options", LAYERS, ids=layer_id)
def test_transformer_equals_torch_in_train_and_eval(options):
    theirs, ours = twins("Transformer", C, H, 2, 2, 16, 0.0, **options)
    tgt, src = layer_inputs(options)

    def call(module, src, tgt):
        padding = mask("bool", (B, T_K), src.dtype)
        causal = torch.ones(T_Q, T_Q, dtype=torch.bool).triu(1)
        own = mask("bool", (B, T_Q), src.dtype)
        padded = dict(src_key_padding_mask=padding, tgt_key_padding_mask=own, memory_key_padding_mask=padding)
        return [module(src, tgt, tgt_mask=causal, **padded)]

    for training in (True, False):
        assert_equals_torch(theirs.train(training), ours.train(training), [src, tgt], call)


def test_float_causal_mask_of_torch_is_taken_with_and_without_the_hint():
    theirs, ours = twins("Transformer", C, H, 1, 2, 16, 0.0, batch_first=True)
    for hint in (None, True, False):

        def call(module, src, tgt, hint=hint):
            causal = decoder.Transformer.generate_square_subsequent_mask(T_Q, dtype=src.dtype)
            return [module(src, tgt, tgt_mask=causal, tgt_is_causal=hint)]

        assert_equals_torch(theirs, ours, inputs([(B, T_K, C), (B, T_Q, C)]), call)


@pytest.mark.parametrize("affine", [{}, {"bias": False}, {"elementwise_affine": False}])
def test_layer_norm_equals_torch(affine):
    theirs, ours = twins("LayerNorm", (3, C), eps=1e-3, **affine)
    assert_equals_torch(theirs, ours, inputs([(B, 3, C)]), lambda m, x: [m(x)])
