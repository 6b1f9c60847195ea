"""Our modules are torch.nn's to everything that looks at a module, and better where torch.nn disagrees with itself."""

import copy
import functools
import inspect
import pickle

import pytest
import torch
from torch import nn

from tileformer import decoder, kernels
from tileformer.decoder.nn.modules import Dropout

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"  # torch.compile does
)
B, T_Q, T_K, C, H = 3, 5, 7, 12, 2
NAMES = ["MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer", "Transformer", "LayerNorm"]
ARGS = {
    "MultiheadAttention": (C, H),
    "TransformerEncoderLayer": (C, H, 16),
    "TransformerDecoderLayer": (C, H, 16),
    "Transformer": (C, H, 2, 2, 16),
    "LayerNorm": (C,),
}


def build(name, cls=decoder, **kwargs):
    torch.manual_seed(0)
    return getattr(cls, name)(*ARGS[name], **kwargs)


def decoder_layer(**kwargs):
    torch.manual_seed(0)
    return decoder.TransformerDecoderLayer(C, H, 16, **{"batch_first": True, "dropout": 0.0, **kwargs})


def decoder_inputs(dtype=torch.float32, batch=B):
    """tgt, memory and the three masks of a decoder layer; the last row of the batch ends early on both sides."""
    generator = torch.Generator().manual_seed(1)
    tgt = torch.randn(batch, T_Q, C, generator=generator, dtype=dtype)
    memory = torch.randn(batch, T_K, C, generator=generator, dtype=dtype)
    tgt_padding, memory_padding = torch.zeros(batch, T_Q).bool(), torch.zeros(batch, T_K).bool()
    tgt_padding[-1, 3:], memory_padding[-1, 4:] = True, True
    masks = {
        "tgt_mask": torch.ones(T_Q, T_Q).bool().triu(1),
        "tgt_key_padding_mask": tgt_padding,
        "memory_key_padding_mask": memory_padding,
    }
    return tgt, memory, masks


@pytest.mark.parametrize("name", [*NAMES, "TransformerEncoder", "TransformerDecoder"])
def test_signatures_begin_with_torchs(name):
    ours, theirs = getattr(decoder, name), getattr(nn, name)
    assert issubclass(ours, theirs)
    for method in ("__init__", "forward"):
        wanted = [(p.name, p.default) for p in inspect.signature(getattr(theirs, method)).parameters.values()]
        got = [(p.name, p.default) for p in inspect.signature(getattr(ours, method)).parameters.values()]
        assert got[: len(wanted)] == wanted
        more = {("cache", None), ("cu_seqlens", None), ("max_seqlen", None), ("project", True), ("seed", None)}
        assert set(got[len(wanted) :]) <= more


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")  # torch's Transformer, when it is built; ours is silent
@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_weights_and_state_dicts_load_both_ways(name, options):
    theirs = build(name, nn, **options)
    after_theirs = torch.rand(())
    ours = build(name, **options)
    assert torch.equal(torch.rand(()), after_theirs)  # as many draws as torch
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_every_child_is_ours_and_torchs():
    model = build("Transformer")
    for child in model.modules():
        if type(child).__module__.startswith("torch.nn.modules"):
            assert isinstance(child, (nn.Linear, nn.ModuleList)), type(child)
    assert isinstance(model.decoder.layers[1].multihead_attn, nn.MultiheadAttention)


@pytest.mark.parametrize("name", NAMES)
def test_deepcopy_pickle_and_meta_device(name):
    module = build(name)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert [type(m) for m in twin.modules()] == [type(m) for m in module.modules()]
        assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), module.parameters(), strict=True))
    assert all(p.is_meta for p in build(name, device="meta").parameters())
    assert all(p.dtype == torch.bfloat16 for p in build(name, dtype=torch.bfloat16).parameters())


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_fully_masked_rows_give_the_output_bias(training, need_weights):
    """One item without a single key, and one query that its mask hides from every key: torch gives NaN in places."""
    attn = decoder.MultiheadAttention(C, H, batch_first=True).train(training)
    nn.init.normal_(attn.out_proj.bias)
    query, key, _ = decoder_inputs()
    query.requires_grad_()
    padding, mask = torch.zeros(B, T_K).bool(), torch.zeros(T_Q, T_K).bool()
    padding[1], mask[2] = True, True
    out, weights = attn(query, key, key, key_padding_mask=padding, attn_mask=mask, need_weights=need_weights)
    assert torch.equal(out[1], attn.out_proj.bias.expand(T_Q, C))
    assert torch.equal(out[:, 2], attn.out_proj.bias.expand(B, C))
    if need_weights:
        assert (weights[1] == 0).all() and (weights[:, 2] == 0).all()
        assert torch.allclose(weights[0, 0].sum(), torch.ones(()))
    out.square().sum().backward()
    assert (query.grad[1] == 0).all() and (query.grad[:, 2] == 0).all() and query.grad[0, 0].abs().sum() > 0
    assert all(p.grad.isfinite().all() for p in attn.parameters())


@pytest.mark.parametrize("norm_first", [False, True])
def test_padded_target_row_is_finite_and_train_equals_eval(norm_first):
    layer = decoder_layer(norm_first=norm_first)
    tgt, memory, masks = decoder_inputs()
    masks["tgt_key_padding_mask"][0] = True
    masks["memory_key_padding_mask"][0] = True
    trained = layer.train()(tgt, memory, **masks)
    with torch.no_grad():
        evaluated = layer.eval()(tgt, memory, **masks)
    assert trained.isfinite().all() and torch.equal(trained, evaluated)


@pytest.mark.parametrize("need_weights", [False, True])
def test_nan_in_padded_keys_does_not_leak(need_weights):
    attn = decoder.MultiheadAttention(C, H, batch_first=True)
    query, key, masks = decoder_inputs()
    padding = masks["memory_key_padding_mask"]
    poisoned = key.masked_fill(padding[..., None], float("nan"))
    clean, _ = attn(query, key, key, key_padding_mask=padding, need_weights=need_weights)
    out, _ = attn(query, poisoned, poisoned, key_padding_mask=padding, need_weights=need_weights)
    assert torch.equal(out, clean)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")  # what torch's stack says to a layer without a fast path
@pytest.mark.parametrize("stack", [nn.TransformerEncoder, decoder.TransformerEncoder])
def test_encoder_takes_no_fast_path_and_makes_no_nested_tensor(stack, monkeypatch):
    """In torch's stack as in ours: post-norm, batch first, evaluation and padding is where torch's layers would."""

    def refuse(*args, **kwargs):
        raise AssertionError("torch's fast path was taken")

    for name in ("_transformer_encoder_layer_fwd", "_nested_tensor_from_mask", "_native_multi_head_attention"):
        monkeypatch.setattr(torch, name, refuse)
    encoder = stack(build("TransformerEncoderLayer", batch_first=True, dropout=0.0), 2)
    _, src, masks = decoder_inputs()
    padding = masks["memory_key_padding_mask"]
    trained = encoder.train()(src, src_key_padding_mask=padding)
    with torch.no_grad():
        evaluated = encoder.eval()(src, src_key_padding_mask=padding)
        alone, _ = encoder.layers[0].self_attn(src, src, src)
    assert torch.equal(trained, evaluated) and alone.isfinite().all()


def test_hooks_and_replaced_output_projections_are_called():
    attn = decoder.MultiheadAttention(C, H, batch_first=True)
    x, *_ = decoder_inputs()
    calls = []
    handle = attn.out_proj.register_forward_hook(lambda module, args, out: calls.append(out.shape))
    plain, _ = attn(x, x, x, need_weights=False)
    assert calls == [(B, T_Q, C)]
    handle.remove()
    attn.out_proj = nn.Sequential(attn.out_proj, nn.Identity())
    assert torch.equal(attn(x, x, x, need_weights=False)[0], plain)


class TorchStyleLayer(decoder.TransformerEncoderLayer):
    """A block as people override it in torch's layer: torch's signature, the branch after its dropout returned."""

    def _ff_block(self, x):
        return self.dropout2(self.linear2(self.activation(self.linear1(x)))) * 2


def test_overridden_blocks_keep_torchs_contract():
    torch.manual_seed(0)
    layer = TorchStyleLayer(C, H, 16, dropout=1.0, batch_first=True)  # any branch dropped twice or not at all shows
    x, *_ = decoder_inputs()
    assert torch.equal(layer(x), layer.norm2(layer.norm1(x)))
    layer.eval()
    h = layer.norm1(x + layer.self_attn(x, x, x)[0])
    assert torch.allclose(layer(x), layer.norm2(h + 2 * layer.linear2(layer.activation(layer.linear1(h)))), atol=1e-6)
    layer.dropout1 = layer.dropout2 = nn.Identity()
    assert layer(x).shape == x.shape


@pytest.mark.parametrize("compiled", [False, True])
def test_each_residual_is_added_by_its_dropout(compiled, monkeypatch):
    """One pass instead of two: every residual of a layer enters the kernel that drops its branch."""
    residuals = []

    def record(x, p, *, residual=None):
        residuals.append(residual is not None)
        return kernels.dropout(x, p, residual=residual)

    monkeypatch.setattr("tileformer.decoder.nn.modules.dropout", record)
    tgt, memory, masks = decoder_inputs()
    layer = decoder_layer(dropout=0.1)
    layer = torch.compile(layer, fullgraph=True, backend="eager") if compiled else layer
    layer(tgt, memory, **masks)
    assert residuals == [True, True, False, True]  # self-attention, cross-attention, within and behind the feed-forward


def test_stacks_use_the_mask_unless_told_that_it_is_causal():
    """A hint is a promise and is believed: with a mask that hides nothing, only the hint can have made it causal."""
    tgt, memory, masks = decoder_inputs()
    causal, nothing, other = masks["tgt_mask"], torch.zeros(T_Q, T_Q).bool(), torch.eye(T_Q).bool()
    encoder = decoder.TransformerEncoder(build("TransformerEncoderLayer", batch_first=True, dropout=0.0), 2)
    stack = decoder.TransformerDecoder(decoder_layer(), 2)
    cross = torch.ones(T_Q, T_K).bool().triu(1)
    for hint in (None, False):
        assert not torch.allclose(encoder(tgt, other, is_causal=hint), encoder(tgt, causal), atol=1e-3)
        assert not torch.allclose(stack(tgt, memory, other, tgt_is_causal=hint), stack(tgt, memory, causal), atol=1e-3)
    assert torch.allclose(encoder(tgt, nothing, is_causal=True), encoder(tgt, causal), atol=1e-6)
    assert torch.allclose(stack(tgt, memory, nothing, tgt_is_causal=True), stack(tgt, memory, causal), atol=1e-6)
    believed = stack(tgt, memory, memory_mask=~cross, memory_is_causal=True)
    assert torch.allclose(believed, stack(tgt, memory, memory_mask=cross), atol=1e-6)


def test_torchs_encoder_arguments_are_kept():
    layer = build("TransformerEncoderLayer", batch_first=True)
    assert decoder.TransformerEncoder(layer, 1).enable_nested_tensor is True
    assert decoder.TransformerEncoder(layer, 1, None, False, False).mask_check is False


def test_dropout_is_drawn_anew_in_training_only():
    layer = decoder_layer(dropout=0.5)
    tgt, memory, masks = decoder_inputs()
    torch.manual_seed(5)
    first, second = layer(tgt, memory, **masks), layer(tgt, memory, **masks)
    torch.manual_seed(5)
    assert torch.equal(layer(tgt, memory, **masks), first)
    assert not torch.equal(first, second)
    layer.eval()
    assert torch.equal(layer(tgt, memory, **masks), layer(tgt, memory, **masks))


@pytest.mark.parametrize("site", ["self_attn", "multihead_attn", "dropout", "dropout1", "dropout2", "dropout3"])
def test_each_dropout_of_torchs_layer_is_a_site_of_ours(site):
    layer = decoder_layer()
    tgt, memory, masks = decoder_inputs()
    plain = layer(tgt, memory, **masks)
    child = getattr(layer, site)
    if isinstance(child, nn.MultiheadAttention):
        child.dropout = 0.5
    else:
        child.p = 0.5
    assert not torch.equal(layer(tgt, memory, **masks), plain)


def test_returned_weights_are_those_that_were_used():
    """As in torch, with dropout: dropped weights are 0, the others are scaled."""
    attn = decoder.MultiheadAttention(C, 1, dropout=0.5, batch_first=True)
    x, *_ = decoder_inputs()
    out, weights = attn(x, x, x)
    v = nn.functional.linear(x, attn.in_proj_weight[2 * C :])
    assert (weights == 0).any()
    assert torch.allclose(out, attn.out_proj(weights @ v), atol=1e-6)


@pytest.mark.parametrize("norm_first", [False, True])
def test_autocast_keeps_the_residual_stream_and_runs_projections_in_bf16(norm_first):
    layer = decoder_layer(norm_first=norm_first, dropout=0.1)
    tgt, memory, masks = decoder_inputs()
    seen = []
    layer.self_attn.out_proj.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(tgt, memory, **masks)
        attn_out, weights = layer.self_attn(tgt, tgt, tgt)
    assert out.dtype == torch.float32 and seen[0] == attn_out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in layer.parameters())


def test_float_attn_mask_gets_its_gradient():
    """A learned bias, added to the scores of every item."""
    query, key, _ = decoder_inputs(torch.float64)
    grads = []
    for cls in (nn.MultiheadAttention, decoder.MultiheadAttention):
        torch.manual_seed(0)
        attn = cls(C, H, batch_first=True, dtype=torch.float64)
        bias = torch.zeros(T_Q, T_K, dtype=torch.float64, requires_grad=True)
        attn(query, key, key, attn_mask=bias, need_weights=False)[0].square().sum().backward()
        grads.append(bias.grad)
    assert torch.allclose(*grads, atol=1e-12) and grads[1].abs().sum() > 0


def test_decoder_layer_compiles_and_exports_in_one_graph():
    layer = decoder_layer()
    tgt, memory, masks = decoder_inputs()
    expected = layer(tgt, memory, **masks)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(tgt, memory, **masks), expected, atol=1e-6)
    exported = torch.export.export(layer, (tgt, memory), masks).module()
    assert torch.allclose(exported(tgt, memory, **masks), expected, atol=1e-6)


def test_decoder_stack_with_a_mask_compiles_in_one_graph():
    """torch's cannot: it compares the mask with the causal one on the host."""
    stack = decoder.TransformerDecoder(decoder_layer(dropout=0.1), 2)
    tgt, memory, masks = decoder_inputs()
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    compiled(tgt, memory, **masks).sum().backward()
    assert all(p.grad is not None for p in stack.parameters())


@pytest.mark.interprets
def test_interpreted_kernels_serve_a_decoder_layer_with_its_three_masks():
    """The layer on the Triton kernels: output and every gradient as on the CPU's own backend."""
    layer = decoder_layer(norm_first=True)
    tgt, memory, masks = decoder_inputs(batch=2)
    results = []
    for name in ("torch", "interpret"):
        with kernels.use_backend(name):
            x = tgt.clone().requires_grad_()
            out = layer(x, memory, **masks, tgt_is_causal=True)
            results.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
    for ours, interpreted in zip(*results, strict=True):
        assert torch.allclose(interpreted, ours, rtol=1e-4, atol=1e-4 * ours.abs().max().item())


X, MEMORY = torch.zeros(B, T_Q, C), torch.zeros(B, T_K, C)
NESTED = torch.nested.nested_tensor([X[0], X[1]], layout=torch.jagged)
BAD_CALLS = {
    "width": (ValueError, "query has 11 features", (X[..., :11], X, X), {}),
    "value width": (ValueError, "value has 11 features", (X, X, X[..., :11]), {}),
    "ranks": (ValueError, "got 3-D, 2-D and 2-D", (X, X[0], X[0]), {}),
    "four axes": (ValueError, "got 4-D", (X[None], X[None], X[None]), {}),
    "batches": (ValueError, "batch_first=True", (X, MEMORY[:2], MEMORY[:2]), {}),
    "key and value": (ValueError, r"\(3, 7, 12\) and value \(3, 5, 12\)", (X, MEMORY, X), {}),
    "integer mask": (TypeError, "attn_mask is torch.int64", (X, X, X), {"attn_mask": torch.zeros(5, 5).long()}),
    "integer padding": (TypeError, "is torch.int32", (X, X, X), {"key_padding_mask": torch.zeros(3, 5).int()}),
    "mask shape": (ValueError, r"\(5, 6\).*\(5, 5\).*\(6, 5, 5\)", (X, X, X), {"attn_mask": torch.zeros(5, 6)}),
    "mask of B": (ValueError, r"\(3, 5, 5\)", (X, X, X), {"attn_mask": torch.zeros(3, 5, 5)}),
    "padding shape": (ValueError, r"\(3, 7\).*\(3, 5\)", (X, X, X), {"key_padding_mask": torch.zeros(3, 7)}),
    "no causal mask": (RuntimeError, "attn_mask is None", (X, X, X), {"is_causal": True}),
    "packed cross-attention": (
        ValueError,
        "packs self-attention",
        (X, MEMORY, MEMORY),
        {"cu_seqlens": torch.tensor([0, 5])},
    ),
    "nested": (TypeError, "nested", (NESTED, NESTED, NESTED), {}),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_call_is_refused_in_one_line(case):
    error, message, args, kwargs = BAD_CALLS[case]
    with pytest.raises(error, match=message) as caught:
        decoder.MultiheadAttention(C, H, batch_first=True)(*args, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES[:4])
@pytest.mark.parametrize(("width", "heads"), [(10, 3), (0, 1), (8, 0)])
def test_heads_that_do_not_divide_the_width_are_refused(name, width, heads):
    with pytest.raises(ValueError, match=f"{width}.*{heads} heads"):
        getattr(decoder, name)(width, heads)


HOOKS = {
    "forward": lambda m: m.register_forward_hook(lambda module, inputs, out: out * 0),
    "pre": lambda m: m.register_forward_pre_hook(lambda module, inputs: inputs[0] * 0),
    "replaced": lambda m: setattr(m, "forward", lambda x: x * 0),
}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("hook", HOOKS)
def test_who_hooks_a_dropout_sees_the_branch_alone(hook, norm_first):
    layer = decoder_layer(norm_first=norm_first)
    tgt, memory, masks = decoder_inputs()
    twin = copy.deepcopy(layer)
    decoder.revert(twin)
    for each in (layer, twin):
        for dropout in (each.dropout1, each.dropout2, each.dropout3):
            HOOKS[hook](dropout)
    torch.testing.assert_close(layer(tgt, memory, **masks), twin(tgt, memory, **masks))
    seen = []
    layer.dropout3.register_full_backward_hook(lambda module, gradients, _: seen.append(len(gradients)))
    if hook == "forward":
        layer(tgt.requires_grad_(), memory, **masks).sum().backward()
        assert seen == [1]


def test_a_wrapped_block_returns_its_branch():
    layer = decoder_layer()
    tgt, memory, masks = decoder_inputs()
    twin = copy.deepcopy(layer)
    decoder.revert(twin)
    for each in (layer, twin):
        block = each._ff_block

        @functools.wraps(block)
        def halved(*args, block=block, **kwargs):
            return block(*args, **kwargs) * 0.5

        each._ff_block = halved
    torch.testing.assert_close(layer(tgt, memory, **masks), twin(tgt, memory, **masks))


@pytest.mark.parametrize("how", ["plain", "hooked", "wrapped"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_layers_take_a_cache(norm_first, how):
    tgt, memory, masks = decoder_inputs()
    torch.manual_seed(0)
    encoder = decoder.TransformerEncoderLayer(C, H, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    layer, caches = decoder_layer(norm_first=norm_first), [decoder.KVCache(1, T_Q).layers[0] for _ in range(2)]
    expected = layer(tgt, memory, masks["tgt_mask"]), encoder(tgt, masks["tgt_mask"])
    for each in (layer, encoder):
        if how == "hooked":
            each.dropout1.register_forward_hook(lambda *_: None)
        if how == "wrapped":
            each._sa_block = lambda *args, block=each._sa_block, **options: block(*args, **options)
    with torch.no_grad():
        tokens = tgt.split(1, dim=1)
        steps = [(layer(x, memory, cache=caches[0]), encoder(x, cache=caches[1].self_attn)) for x in tokens]
    for step, whole in zip(zip(*steps, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(step, 1), whole.detach(), atol=1e-5, rtol=1e-4)


def test_a_stack_takes_a_cache_of_its_depth():
    tgt, memory, masks = decoder_inputs()
    stack = decoder.TransformerDecoder(decoder_layer(), 2).requires_grad_(False)
    for x in stack.layers[1].parameters():
        x.mul_(1.5)
    cache = decoder.KVCache(2, T_Q)
    steps = [stack(x, memory, cache=cache) for x in tgt.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), stack(tgt, memory, masks["tgt_mask"]), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="the cache has 3 layers, this decoder 2"):
        stack(tgt, memory, cache=decoder.KVCache(3, T_Q))


def test_packed_sequences_of_a_module_stay_apart():
    attn, ends = decoder.MultiheadAttention(C, H, batch_first=True), torch.tensor([0, 2, 7])
    x = torch.randn(1, 7, C)
    out, _ = attn(x, x, x, need_weights=False, is_causal=True, cu_seqlens=ends)
    for part, own in zip(out.split([2, 5], 1), x.split([2, 5], 1), strict=True):
        hidden = torch.ones(own.shape[1], own.shape[1]).bool().triu(1)
        torch.testing.assert_close(part, attn(own, own, own, need_weights=False, attn_mask=hidden)[0])


def test_what_torchs_modules_also_take():
    assert Dropout(0.5)(torch.tensor(3.0)).item() in (0.0, 6.0)
    assert Dropout(0.5).eval()(torch.tensor(3.0), torch.tensor(1.0)) == 4.0
    logits, target = torch.randn(3, 5), torch.tensor([0, 4, 2], dtype=torch.uint8)
    torch.testing.assert_close(decoder.CrossEntropyLoss()(logits, target), torch.nn.CrossEntropyLoss()(logits, target))
    whole = decoder.Transformer(10, custom_encoder=torch.nn.Identity(), custom_decoder=torch.nn.Identity())
    assert whole.d_model == 10  # nhead is nobody's
    with pytest.raises(ValueError, match="10"):
        decoder.Transformer(10, custom_encoder=torch.nn.Identity())
