"""Fused Triton kernels of a decoder layer as differentiable functions, and their eager definitions.

Every function takes ordinary tensors. `use_backend` says what serves a call; by default compiled Triton kernels serve
CUDA tensors and plain torch operators CPU tensors. `reference` defines each op.
"""

from tileformer.kernels import launch, reference, selftest
from tileformer.kernels.add_norm import add_layer_norm, add_rms_norm
from tileformer.kernels.attention import attention, scaled_dot_product_attention
from tileformer.kernels.attention.decode import append_kv_cache, decode_attention
from tileformer.kernels.backend import use_backend
from tileformer.kernels.cross_entropy import cross_entropy
from tileformer.kernels.dropout import bias_activation_dropout, dropout
from tileformer.kernels.layer_norm import layer_norm, rms_norm
from tileformer.kernels.linear_cross_entropy import linear_cross_entropy
from tileformer.kernels.random import dropout_keep
from tileformer.kernels.rotary import rotary, rotary_tables
from tileformer.kernels.softmax import log_softmax, softmax

launch.selftest = selftest.run_once  # before a process's first launch on a GPU

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "append_kv_cache",
    "attention",
    "bias_activation_dropout",
    "cross_entropy",
    "decode_attention",
    "dropout",
    "dropout_keep",
    "layer_norm",
    "linear_cross_entropy",
    "log_softmax",
    "reference",
    "rms_norm",
    "rotary",
    "rotary_tables",
    "scaled_dot_product_attention",
    "softmax",
    "use_backend",
]
