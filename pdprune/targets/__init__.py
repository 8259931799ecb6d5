"""Small networks that ship with the package, and what trained them."""

from pdprune.targets.corpus import StdlibCorpus
from pdprune.targets.store import Target, load_target, save_target, shipped_targets
from pdprune.targets.tokenizer import AsciiTokenizer
from pdprune.targets.training import TargetTrainer, WeightSparsity
from pdprune.targets.transformer import Transformer, TransformerConfig

__all__ = [
    "AsciiTokenizer",
    "StdlibCorpus",
    "Target",
    "TargetTrainer",
    "Transformer",
    "TransformerConfig",
    "WeightSparsity",
    "load_target",
    "save_target",
    "shipped_targets",
]
