"""How autograd sees the kernels: registered torch ops, and Functions with a short way past torch's bookkeeping.

`Function.apply` inspects forward's signature at every call, and the dispatcher is asked again for each registered op:
together 30 microseconds, 1.8 to 8 times of what else a call costs the host. Neither is needed where nothing listens.
The short way asks torch for that, in named questions. A torch that does not answer one of them gets the long way.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from tileformer.kernels import checks

P = ParamSpec("P")
R = TypeVar("R")


class RegisteredOp:
    """What serves a registered op now."""

    schema: str
    launcher: Callable[..., Any]
    fake: Callable[..., Any]
    library: torch.library.Library


# By name. Reloading this module, or a kernel's, leaves the ops registered.
registered: dict[str, RegisteredOp] = globals().get("registered", {})


def register(launcher: Callable[P, R], fake: Callable[..., R], mutates: Sequence[str] = ()) -> Callable[P, R]:
    """Make `tileformer::<launcher's name>` from a typed function that returns new tensors; `fake` gives their shapes.

    `mutates` names the arguments that it writes to.

    One implementation serves all devices: compiled on CUDA tensors, interpreted on CPU tensors. `Library.define` costs
    a fraction of `torch.library.custom_op` per call. Called again (a kernel's file is reloaded), the new one serves.
    """
    name = launcher.__name__
    schema = torch.library.infer_schema(launcher, mutates_args=mutates)
    known = name in registered
    op = registered.setdefault(name, RegisteredOp())
    if not known or op.schema != schema:
        if known:
            op.library._destroy()  # and with it torch's op, which has another schema
        op.schema, op.library = schema, torch.library.Library("tileformer", "FRAGMENT")
        op.library.define(name + schema)
        op.library.impl(name, lambda *args: op.launcher(*args), "CompositeExplicitAutograd")
        torch.library.register_fake(f"tileformer::{name}", lambda *args: op.fake(*args), lib=op.library)
    op.launcher, op.fake = launcher, fake
    return getattr(torch.ops.tileformer, name).default


missing: list[str] = []  # names that the short way needs and this torch lacks: with one, it is never taken


def _of_torch(path: str) -> Any:
    """A private name of torch, if it is there."""
    try:
        return functools.reduce(getattr, path.split("."), torch)
    except AttributeError:
        missing.append(path)
        return None


# The questions. Each is true where something has to see or change the call.
# A TorchFunctionMode is active, or a tensor has a `__torch_function__`: it is called with the ops.
listens_to_functions = _of_torch("_C._has_torch_function")
# A profiler is active: it shows the registered ops by their names.
profiles = _of_torch("_C._autograd._profiler_enabled")
_dispatch_keys = _of_torch("_C._dispatch_keys")
_thread_keys = _of_torch("_C._dispatch_tls_local_include_set")
_of_torch("_C._FunctionBase.apply")
_of_torch("autograd.forward_ad._current_level")

_PLAIN_KEYS = "CPU CUDA AutogradCPU AutogradCUDA AutocastCPU AutocastCUDA ADInplaceOrView BackendSelect"
_keys = [_of_torch(f"_C.DispatchKey.{name}") for name in _PLAIN_KEYS.split()]
_KeySet = _of_torch("_C.DispatchKeySet")
# All dispatch keys but those of a plain tensor, and of a thread in which nothing listens to ops.
_LISTENING = 0 if missing else ~functools.reduce(lambda bits, key: bits | _KeySet(key).raw_repr(), _keys, 0)


def in_forward_mode() -> bool:
    """A dual level is open: forward mode gets an error in words of our own, and never a silent zero."""
    return forward_ad._current_level >= 0


def listens_to_ops() -> int:
    """A dispatch mode, a transform of torch.func or a tracer is active in this thread: it sees the registered ops."""
    return _thread_keys().raw_repr() & _LISTENING


def is_special(x: Tensor) -> int:
    """x is no memory that a kernel can read: a wrapper, or a lazy negation or zero, made real by the dispatcher."""
    return _dispatch_keys(x).raw_repr() & _LISTENING


class Function(torch.autograd.Function):
    """What autograd keeps and does for a registered op; `forward = registered_forward(launcher, fake)`."""

    generate_vmap_rule = True


def registered_forward(launcher: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """A Function's forward that calls the registered op, with the launcher's signature: torch.compile asks for it."""
    op = register(launcher, fake)
    return staticmethod(functools.wraps(launcher)(lambda *args: op(*args)))


class KernelFunction(Generic[P, R]):
    """A launcher that autograd differentiates: called as the launcher is, it returns what the launcher does.

    Args:
        launcher: makes new tensors from positional arguments, without defaults.
        function: its setup_context says what is kept, its forward calls the registered op.
        tracked: what is applied instead where nothing but autograd listens; its results may be others.
    """

    def __init__(
        self, launcher: Callable[P, R], function: type[torch.autograd.Function],
        tracked: type[torch.autograd.Function] | None = None,
    ) -> None:  # fmt: skip
        self.op, self.function = registered[launcher.__name__], function  # the op follows a reload of the launcher
        self.tracked = tracked

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if missing or is_compiling():  # a compiler traces the Function itself
            return self.function.apply(*args)
        if in_forward_mode():
            return self._without_tangents.apply(*args)
        if listens_to_functions(args) or listens_to_ops() or profiles():
            return self.function.apply(*args)
        tracked = False
        for x in args:
            if isinstance(x, Tensor):
                if is_special(x):
                    checks.plain(self.function.__name__.strip("_"), x)
                    return self.function.apply(*args)
                if x.requires_grad:
                    tracked = True
        if tracked and torch.is_grad_enabled():
            return self._fused_forward(*args)
        return self.op.launcher(*args)

    @functools.cached_property
    def _fused_forward(self) -> Callable[..., Any]:
        """`apply` of the same Function with launcher and setup_context in one, as torch's C code has it."""
        op, function = self.op, self.function
        if self.tracked is not None:
            return self.tracked.apply

        def forward(ctx: Any, *args: Any) -> Any:
            output = op.launcher(*args)
            function.setup_context(ctx, args, output)
            return output

        methods = dict(forward=staticmethod(forward), backward=staticmethod(function.backward))
        fused = type(function.__name__, (torch.autograd.Function,), methods)
        return super(torch.autograd.Function, fused).apply  # type: ignore[misc]

    @functools.cached_property
    def _without_tangents(self) -> Any:
        """The same Function, refusing forward mode in words of its own: torch.compile does not trace one with a jvp."""
        name = self.function.__name__

        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise NotImplementedError(
                f"{name.strip('_')}: the fused kernels have no forward-mode derivative: use reverse mode "
                "(torch.func.jacrev; a Hessian is jacrev(jacrev(f))), or use_backend('reference')"
            )

        return type(name, (self.function,), {"jvp": staticmethod(jvp)})
