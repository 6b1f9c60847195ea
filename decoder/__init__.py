"""Modules with torch.nn's constructors and state_dict keys on our kernels, and models built from them."""

from tileformer.decoder.attention import MultiheadAttention
from tileformer.decoder.cache import KVCache
from tileformer.decoder.convert import Report, convert, revert
from tileformer.decoder.generation import generate
from tileformer.decoder.heads import Classifier, Tagger
from tileformer.decoder.layer import TransformerDecoderLayer, TransformerEncoderLayer
from tileformer.decoder.lm import DecoderLM, DecoderLMConfig
from tileformer.decoder.modules import CrossEntropyLoss, LayerNorm, Softmax
from tileformer.decoder.seq2seq import Seq2Seq, Seq2SeqConfig
from tileformer.decoder.transformer import Transformer, TransformerDecoder, TransformerEncoder

__all__ = [
    "Classifier",
    "CrossEntropyLoss",
    "DecoderLM",
    "DecoderLMConfig",
    "KVCache",
    "LayerNorm",
    "MultiheadAttention",
    "Report",
    "Seq2Seq",
    "Seq2SeqConfig",
    "Softmax",
    "Tagger",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "convert",
    "generate",
    "revert",
]
