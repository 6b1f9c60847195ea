"""MultiheadAttention: torch.nn's module on the fused attention kernel."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tileformer.decoder.blocks import Attention, check_heads
from tileformer.decoder.generation.cache import AttentionCache
from tileformer.kernels import attention, checks


class MultiheadAttention(Attention):
    """``torch.nn.MultiheadAttention``: same constructor, forward signature, parameters and state_dict keys.

    It differs from torch's module where torch's differs from itself. A query that may attend to nothing has attention
    output and weights 0 (so the module returns ``out_proj``'s bias) in training, in evaluation and with weights;
    ``out_proj`` is called as a module, so its hooks and adapters run; ``is_causal=True`` is the caller's promise that
    ``attn_mask`` is the causal mask and is always kept, without reading the mask. Nested tensors are refused.
    """

    def __init__(
        self,
        embed_dim,
        num_heads,
        dropout=0.0,
        bias=True,
        add_bias_kv=False,
        add_zero_attn=False,
        kdim=None,
        vdim=None,
        batch_first=False,
        device=None,
        dtype=None,
    ) -> None:
        check_heads(embed_dim, num_heads)
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        cache: AttentionCache | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        project: bool = True,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from ``query`` to ``key`` and ``value``; see ``torch.nn.MultiheadAttention.forward``.

        Shapes: query (B, T_q, C), key (B, T_k, kdim), value (B, T_k, vdim) with ``batch_first``, else (T, B, C); all
        three 2-D without a batch. ``key_padding_mask`` (B, T_k), ``attn_mask`` (T_q, T_k) or (B * H, T_q, T_k), each
        boolean (True = masked out) or floating (added to the scores); a ``CausalBias`` of torch.nn.attention.bias is
        the mask that it names. ``cache`` holds earlier keys and values.

        ``cu_seqlens`` int32 or int64 (N + 1,), ascending from 0: the one row of a batch of 1 is N sequences behind each
        other, and attention stays inside each; ``is_causal`` then needs no mask, and there are no weights.
        ``max_seqlen`` bounds their length: a GPU is spared work that finds nothing to do. ``seed``: of the dropout;
        not ``project``: the output is what ``out_proj`` would be given.

        Returns the output, shaped as query, and the weights (B, T_q, T_k), (B, H, T_q, T_k) without averaging, or None.

        Raises ValueError on shapes that do not fit, TypeError on a mask that is neither boolean nor floating or on
        nested tensors, RuntimeError on ``is_causal`` without a mask (as torch), all before any computation.
        """
        passed = attn_mask
        attn_mask = self._check(query, key, value, attn_mask, key_padding_mask, cache)
        is_causal = is_causal and attn_mask is passed  # a CausalBias says itself which diagonal it means
        packed = cu_seqlens is not None
        if packed and (query is not key or key is not value or cache is not None):
            raise ValueError("cu_seqlens packs self-attention: pass one tensor as query, key and value, and no cache")
        if is_causal and attn_mask is None and cache is None and not packed:
            raise RuntimeError(
                "is_causal=True says that attn_mask is the causal mask, but attn_mask is None: pass it as well, "
                "e.g. Transformer.generate_square_subsequent_mask(T)"
            )
        appends = self.bias_k is not None or self.add_zero_attn
        if packed and appends:
            raise NotImplementedError(
                "cu_seqlens does not serve add_bias_kv or add_zero_attn: they belong to no sequence"
            )

        q, k, v = self._project(query, key, value, cache)
        causal = is_causal and not appends  # every query sees appended keys: only the mask says so
        mask, key_mask = self._kernel_masks(None if causal else attn_mask, key_padding_mask)
        if appends:
            k, v, mask, key_mask = self._append_keys(k, v, mask, key_mask)
        p = self.dropout if self.training else 0.0
        options: dict[str, Any] = {"causal": causal, "mask": mask, "key_mask": key_mask, "dropout_p": p, "seed": seed}
        if cache is not None and cache.grows:
            options |= cache.reach(q.shape[2], mask)
        # A bound without sequences is the kernel's error to name.
        options |= {"max_seqlen_q": max_seqlen, "max_seqlen_k": max_seqlen}
        options |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
        if need_weights:
            options["return_weights"] = "average" if average_attn_weights else True
        out, weights = attention(q, k, v, **options), None
        if need_weights:
            out, weights = out
            weights = weights if query.dim() == 3 else weights.squeeze(0)
        out = self._join_heads(out, query.dim())
        return self.out_proj(out) if project else out, weights

    opens: Any = forward

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        cache: AttentionCache | None,
    ) -> Tensor | None:
        """Raise for what does not fit; ``attn_mask`` as a tensor of values."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise TypeError("nested tensors are not supported: pad them and pass key_padding_mask")
        if not query.dim() == key.dim() == value.dim() or query.dim() not in (2, 3):
            raise ValueError(
                "query, key and value must all be 3-D, or all 2-D without a batch, "
                f"got {query.dim()}-D, {key.dim()}-D and {value.dim()}-D"
            )
        for name, x, width in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if x.shape[-1] != width:
                raise ValueError(f"{name} has {x.shape[-1]} features in its last axis, this module takes {width}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(f"key {tuple(key.shape)} and value {tuple(value.shape)} differ before their last axis")

        batched = query.dim() == 3
        time = 1 if batched and self.batch_first else 0
        B = query.shape[1 - time] if batched else 1
        T_q, T_k = query.shape[time], key.shape[time]
        if batched and key.shape[1 - time] != B:
            raise ValueError(
                f"query {tuple(query.shape)} and key {tuple(key.shape)} differ in the batch, axis {1 - time}: "
                f"this module was built with batch_first={self.batch_first}"
            )
        if cache is not None:
            if self.bias_k is not None or self.add_zero_attn:
                raise NotImplementedError("a cache does not serve add_bias_kv or add_zero_attn, whose keys stand last")
            T_k = cache.keys_after(B, T_k)
        if variant := checks.causal_variant("attn_mask", attn_mask, (T_q, T_k)):
            attn_mask = ~checks.triangle(variant, (T_q, T_k), query.device)
        for name, mask in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
            if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
                raise TypeError(f"{name} is {mask.dtype}: pass a boolean mask (True = masked out) or a floating one")
        one, all_heads = (T_q, T_k), (B * self.num_heads, T_q, T_k)
        if attn_mask is not None and attn_mask.shape not in (one, all_heads):
            raise ValueError(
                f"attn_mask {tuple(attn_mask.shape)} must be (T_q, T_k) {one} or (B * H, T_q, T_k) {all_heads}"
            )
        keys = (B, T_k) if batched else (T_k,)
        if key_padding_mask is not None and key_padding_mask.shape != keys:
            raise ValueError(f"key_padding_mask {tuple(key_padding_mask.shape)} must be one value a key, {keys}")
        return attn_mask

    def _kernel_masks(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """torch's masks (True = masked out) as the kernels read them (True = may attend): inverted, never expanded.

        Returns ``mask``, broadcastable to (B, H, T_q, T_k), and the boolean ``key_mask`` (B, T_k).
        """
        mask = attn_mask
        if mask is not None:
            if mask.dim() == 3:
                mask = mask.unflatten(0, (mask.shape[0] // self.num_heads, self.num_heads))  # [B, H, T_q, T_k]
            if mask.dtype == torch.bool:
                mask = ~mask
        if key_padding_mask is None:
            return mask, None
        if key_padding_mask.dim() == 1:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        if key_padding_mask.dtype == torch.bool:
            return mask, ~key_padding_mask
        bias = key_padding_mask[:, None, None, :]  # [B, 1, 1, T_k]
        if mask is None:
            return bias, None
        if mask.dtype == torch.bool:
            return torch.where(mask, bias, float("-inf")), None
        wide = torch.promote_types(mask.dtype, torch.float32)  # the sum of two finite halves may be beyond a half
        return mask.to(wide) + bias, None

    def _append_keys(
        self, k: Tensor, v: Tensor, mask: Tensor | None, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The keys of ``add_bias_kv`` and ``add_zero_attn``, behind the others and open to every query."""
        B, H, T_k, D = k.shape
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.view(1, H, 1, D).expand(B, H, 1, D)], dim=2)
            v = torch.cat([v, self.bias_v.view(1, H, 1, D).expand(B, H, 1, D)], dim=2)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        added = (0, k.shape[2] - T_k)
        if mask is not None:
            mask = F.pad(mask, added, value=mask.dtype == torch.bool)
        if key_mask is not None:
            key_mask = F.pad(key_mask, added, value=True)
        return k, v, mask, key_mask
