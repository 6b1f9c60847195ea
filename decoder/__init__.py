"""Modules with torch.nn's constructors and state_dict keys on our kernels, and models built from them."""

from tileformer.decoder import name_maps  # noqa: F401 (what folders of others are called)
from tileformer.decoder.causal import CausalConfig, CausalLM
from tileformer.decoder.export import to_ctranslate2
from tileformer.decoder.generation import Options, generate, stream
from tileformer.decoder.generation.cache import KVCache
from tileformer.decoder.generation.engine import Engine, Event
from tileformer.decoder.generation.incremental import incremental
from tileformer.decoder.generation.speculative import generate_speculatively
from tileformer.decoder.heads import Classifier, Tagger
from tileformer.decoder.loading import LoadReport, common_rows, load_matching
from tileformer.decoder.model import DecoderLM, DecoderLMConfig, Seq2Seq, Seq2SeqConfig
from tileformer.decoder.nn.attention import MultiheadAttention
from tileformer.decoder.nn.convert import convert, revert
from tileformer.decoder.nn.layer import TransformerDecoderLayer, TransformerEncoderLayer
from tileformer.decoder.nn.modules import CrossEntropyLoss, LayerNorm, LogSoftmax, RMSNorm, Softmax
from tileformer.decoder.nn.transformer import Transformer, TransformerDecoder, TransformerEncoder
from tileformer.decoder.pretrained import load, save_pretrained
from tileformer.decoder.recurrent import RecurrentConfig, RecurrentLM, RecurrentSeq2Seq
from tileformer.decoder.tokenizer import Tokenizer

__all__ = [
    "CausalConfig",
    "CausalLM",
    "Classifier",
    "CrossEntropyLoss",
    "DecoderLM",
    "DecoderLMConfig",
    "Engine",
    "Event",
    "KVCache",
    "LoadReport",
    "LayerNorm",
    "LogSoftmax",
    "MultiheadAttention",
    "Options",
    "RMSNorm",
    "RecurrentConfig",
    "RecurrentLM",
    "RecurrentSeq2Seq",
    "Seq2Seq",
    "Seq2SeqConfig",
    "Softmax",
    "Tagger",
    "Tokenizer",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "common_rows",
    "convert",
    "generate",
    "generate_speculatively",
    "incremental",
    "load",
    "load_matching",
    "revert",
    "save_pretrained",
    "stream",
    "to_ctranslate2",
]
