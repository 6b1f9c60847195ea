"""DTensors and nested tensors. An op runs on what each process holds, or on the values, where that is the same, and
refuses in one line where it is not (the registered ops have no sharding strategies, and no nested kernels).

Each axis has a role: a name where rows along it are independent (it may be sharded), None where a row needs it whole.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tileformer.kernels import checks, random
from tileformer.kernels.backend import choose
from tileformer.kernels.checks import is_sharded

Roles = Sequence[Any]
_SPREAD = 0x1E3779B97F4A7C15  # odd: seeds of neighbouring shards differ in all their bits


def is_special(x: Any) -> bool:
    """Whether x is nested or a DTensor. Only asked where ``type(x) is not Tensor or x.is_nested``."""
    return is_sharded(x) or (isinstance(x, Tensor) and x.is_nested)


def by_parts(op: str, x: Any, axes: int) -> bool:
    """Whether a row op runs on the parts of x. Not of a plain tensor, nor of a DTensor whose rows of ``axes`` axes are
    sharded and which plain torch operators serve: torch gathers these."""
    if not is_special(x) or x.is_nested:
        return is_special(x)
    whole = all(p.is_replicate() or (type(p).__name__ == "Shard" and p.dim < x.dim() - axes) for p in x.placements)
    return whole or choose(op, x) not in ("torch", "reference")


def by_rows(
    op: str, call: Callable[..., Tensor], x: Tensor, axes: int,
    whole: Sequence[Tensor | None] = (), beside: Sequence[Tensor | None] = (),
) -> Tensor:  # fmt: skip
    """``call(x, *whole, *beside)``, of x's shape; rows are the last ``axes`` axes: ``whole`` (weights) is every row's,
    ``beside`` (a residual, a mask) expands to x's shape."""
    if x.is_nested:
        return _by_values(op, call, x, axes, whole, beside)
    roles = [*range(x.dim() - axes), *[None] * axes]
    tensors = [(x, roles), *((w, ()) for w in whole), *((b, expanded(b, roles)) for b in beside)]
    return on_shards(op, call, tensors, [(roles, x.shape)])


def expanded(x: Tensor | None, roles: Roles) -> Roles:
    """The roles of a tensor that expands to one with these: an axis of size 1 is everybody's."""
    n = 0 if x is None else x.dim()
    return [role if x is not None and x.shape[i] != 1 else None for i, role in enumerate(roles[len(roles) - n :])]


def _by_values(op: str, call: Any, x: Any, axes: int, whole: Sequence[Any], beside: Sequence[Any]) -> Tensor:
    if x.layout != torch.jagged or x._lengths is not None or x._ragged_idx != 1 or x.dim() - axes < 2:
        raise TypeError(
            f"{op}: a nested tensor must be jagged (layout=torch.jagged), without gaps, and ragged along axis 1, "
            "which no row spans: pad it with torch.nested.to_padded_tensor"
        )
    for b in beside:
        if b is not None and not (b.is_nested and b.layout == torch.jagged and b.shape == x.shape):
            raise TypeError(f"{op}: beside a jagged x, pass jagged tensors of the same offsets, or pad them all")
    values = call(x.values(), *whole, *(None if b is None else b.values() for b in beside))
    lengths: Any = dict(min_seqlen=x._maybe_min_seqlen, max_seqlen=x._maybe_max_seqlen)
    return torch.nested.nested_tensor_from_jagged(values, x.offsets(), **lengths)


def on_shards(
    op: str, call: Callable[..., Any], tensors: Sequence[tuple[Tensor | None, Roles]],
    outputs: Sequence[tuple[Roles, Sequence[int]]],
) -> Any:  # fmt: skip
    """``call`` on what this process holds of each tensor (with its axes' roles); DTensors (roles, whole shapes).

    The first tensor says how all are sharded. Tensors without a sharded axis must be whole on every process; their
    gradients are sums over processes.

    Raises:
        TypeError: where a row lies on several processes, or the tensors are not sharded alike.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    lead: Any = tensors[0][0]
    split: list[Any] = []
    for placement in lead.placements:
        role = tensors[0][1][placement.dim] if type(placement) is Shard else None
        if role is None and not placement.is_replicate():
            raise TypeError(
                f"{op}: a DTensor of shape {tuple(lead.shape)} with placement {placement} is not whole along the axes "
                "that a row needs: call x.redistribute(placements=[Replicate()]) first, or shard another axis"
            )
        split.append(role)

    def places(roles: Roles) -> list[Any]:
        return [Replicate() if role is None or role not in roles else Shard(list(roles).index(role)) for role in split]

    def local(x: Any, roles: Roles) -> Any:
        if x is None:
            return None
        wanted = places(roles)
        if not is_sharded(x):
            if x.requires_grad or any(p.is_shard() for p in wanted):
                plain = f"a plain tensor of shape {tuple(x.shape)}"
                raise TypeError(f"{op}: {plain} stands beside a DTensor: distribute it with placements {tuple(wanted)}")
            return x
        if list(x.placements) != wanted or x.device_mesh != lead.device_mesh:
            raise TypeError(
                f"{op}: a DTensor of shape {tuple(x.shape)} has placements {x.placements} and needs "
                f"{tuple(wanted)}, as the first has {lead.placements}: call x.redistribute"
            )
        grads = [
            Partial() if p.is_replicate() and role is not None else p for p, role in zip(wanted, split, strict=True)
        ]
        return x.to_local(grad_placements=grads)

    def whole(y: Tensor, roles: Roles, shape: Sequence[int]) -> Any:
        like: Any = torch.empty(shape, device="meta")
        layout = dict(shape=like.shape, stride=like.stride())
        return DTensor.from_local(y, lead.device_mesh, places(roles), run_check=False, **layout)

    results = call(*(local(x, roles) for x, roles in tensors))
    if isinstance(results, tuple):
        return tuple(whole(y, *output) for y, output in zip(results, outputs, strict=True))
    return whole(results, *outputs[0])


def shard_seed(x: Any, seed: Any) -> Tensor | None:
    """A seed for this process's share of x: other bits for each shard; as given if x is no DTensor."""
    if not is_sharded(x):
        return seed
    mesh, drawn, index = x.device_mesh, seed is None, 0
    own: Any = random.new_seed(x.device) if seed is None else seed.to_local() if is_sharded(seed) else seed
    for axis, (placement, place) in enumerate(zip(x.placements, mesh.get_coordinate(), strict=True)):
        if placement.is_shard():
            index = index * mesh.size(axis) + place
        elif drawn and mesh.size(axis) > 1:  # their generators may differ
            torch.distributed.broadcast(own, group=mesh.get_group(axis), group_src=0)
    return own + index * _SPREAD % random.SEED_LIMIT


def attention_on_shards(
    attention: Any, q: Any, k: Any, v: Any, sides: dict[str, Any], dropout_p: float, seed: Any, options: dict[str, Any]
) -> Any:
    """``attention`` of DTensors with batch or heads sharded; ``sides``: mask, bias, values of sequences or heads."""
    if not is_sharded(q) or q.dim() != 4:
        checks.plain("attention", q, k, v)
    roles = ("batch", "heads", None, None)
    named: dict[str, Roles] = dict(key_mask=("batch", None), query_lengths=("batch",), key_lengths=("batch",))
    slopes = sides["alibi_slopes"]
    named["alibi_slopes"] = ("heads",) if slopes is None or slopes.dim() == 1 else ("batch", "heads")
    named |= {name: expanded(sides[name], roles) for name in ("mask", "bias")}
    for axis, placement in enumerate(q.placements):
        n = q.device_mesh.size(axis)
        if placement.is_shard(1) and (q.shape[1] % n or k.shape[1] % n):
            raise TypeError(
                f"attention: {q.shape[1]} query heads and {k.shape[1]} key heads cannot both be shared by "
                f"{n} processes: replicate them"
            )
        if placement.is_shard(1) and options["return_weights"] == "average":
            raise TypeError("attention: an average over heads that are sharded: pass return_weights=True, and average")
    tensors = [(q, roles), (k, roles), (v, roles), *((x, named[name]) for name, x in sides.items())]
    outputs: list[tuple[Roles, Sequence[int]]] = [(roles, (*q.shape[:3], v.shape[3]))]
    if options["return_lse"]:
        outputs.append((roles[:3], q.shape[:3]))
    if options["return_weights"]:
        average = options["return_weights"] == "average"
        shape = (*q.shape[:3], k.shape[2])
        outputs.append(((roles[0], None, None), shape[:1] + shape[2:]) if average else (roles, shape))
    own = shard_seed(q, seed) if dropout_p > 0.0 else None

    def call(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> Any:
        return attention(q, k, v, **dict(zip(sides, given, strict=True)), dropout_p=dropout_p, seed=own, **options)

    return on_shards("attention", call, tensors, outputs)
