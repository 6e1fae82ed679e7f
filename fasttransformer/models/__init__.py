"""Models of text from this package's operations: train them, save them, generate with them.

>>> from fasttransformer.models import Decoder, Encoder, Seq2SeqModel
>>> model = Seq2SeqModel(Encoder(260, 32, 64, 1, 4), Decoder(260, 32, 64, 1, 4))
>>> model(["source"], ["target"]).loss.dim()
0
"""

from .classifier import SpanModel, TextClassifier
from .config import TransformerConfig
from .decoder import Decoder
from .encoder import Encoder, EncoderOutput
from .language_model import LanguageModel
from .minilm_classifier import MiniLMClassifier
from .outputs import TextOutput
from .pretrained import TextModel
from .seq2seq import Seq2SeqModel
from .tokenizer import Tokenizer

__all__ = [
    "Decoder",
    "Encoder",
    "EncoderOutput",
    "LanguageModel",
    "MiniLMClassifier",
    "Seq2SeqModel",
    "SpanModel",
    "TextClassifier",
    "TextModel",
    "TextOutput",
    "Tokenizer",
    "TransformerConfig",
]
