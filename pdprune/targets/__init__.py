"""Small networks that ship with the package, and what trained them."""

from pdprune.targets.corpus import StdlibCorpus
from pdprune.targets.store import Target, load_target, save_target, shipped_targets
from pdprune.targets.tokenizer import AsciiTokenizer
from pdprune.targets.toy_data import InductionSequences, SparseFeatures
from pdprune.targets.toy_training import ToyTrainer
from pdprune.targets.toys import (
    TMS,
    InductionConfig,
    InductionTransformer,
    ResidualMLP,
    ResidualMLPConfig,
    TMSConfig,
)
from pdprune.targets.training import TargetTrainer, WeightSparsity
from pdprune.targets.transformer import Transformer, TransformerConfig

__all__ = [
    "TMS",
    "AsciiTokenizer",
    "InductionConfig",
    "InductionSequences",
    "InductionTransformer",
    "ResidualMLP",
    "ResidualMLPConfig",
    "SparseFeatures",
    "StdlibCorpus",
    "TMSConfig",
    "Target",
    "TargetTrainer",
    "ToyTrainer",
    "Transformer",
    "TransformerConfig",
    "WeightSparsity",
    "load_target",
    "save_target",
    "shipped_targets",
]
