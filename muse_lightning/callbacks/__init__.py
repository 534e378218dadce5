"""One concern each: what is watched, and what is written, while a Trainer runs."""

from muse_lightning.callbacks.attention_error import AttentionError
from muse_lightning.callbacks.banner import Banner
from muse_lightning.callbacks.context_gain import ContextGain
from muse_lightning.callbacks.context_warmup import ContextWarmup
from muse_lightning.callbacks.environment_file import EnvironmentFile
from muse_lightning.callbacks.exact_heads import ExactHeads
from muse_lightning.callbacks.exact_tail import ExactTail
from muse_lightning.callbacks.future_gain import FutureGain
from muse_lightning.callbacks.gradient_norm import GradientNorm
from muse_lightning.callbacks.identifier_recall import IdentifierRecall
from muse_lightning.callbacks.ledger import Ledger
from muse_lightning.callbacks.loss_by_position import LossByPosition
from muse_lightning.callbacks.memory_use import MemoryUse
from muse_lightning.callbacks.needle_retrieval import NeedleRetrieval
from muse_lightning.callbacks.ngram_baseline import NgramBaseline
from muse_lightning.callbacks.prediction_files import PredictionFiles
from muse_lightning.callbacks.progress import ProgressLines
from muse_lightning.callbacks.run_text import RunText
from muse_lightning.callbacks.scalar_layout import LONG_CONTEXT_CALLBACKS, ScalarLayout
from muse_lightning.callbacks.step_time import StepTime
from muse_lightning.callbacks.stop_after import StopAfter
from muse_lightning.callbacks.throughput import DeviceThroughput

DEFAULT_CALLBACKS = (DeviceThroughput, StepTime, MemoryUse, GradientNorm, LossByPosition, AttentionError, ExactHeads)
"""What every fit and `muse validate` have: the tags in docs/training.md."""

__all__ = [
    "DEFAULT_CALLBACKS",
    "LONG_CONTEXT_CALLBACKS",
    "AttentionError",
    "Banner",
    "ContextGain",
    "ContextWarmup",
    "DeviceThroughput",
    "EnvironmentFile",
    "ExactHeads",
    "ExactTail",
    "FutureGain",
    "GradientNorm",
    "IdentifierRecall",
    "Ledger",
    "LossByPosition",
    "MemoryUse",
    "NeedleRetrieval",
    "NgramBaseline",
    "PredictionFiles",
    "ProgressLines",
    "RunText",
    "ScalarLayout",
    "StepTime",
    "StopAfter",
]
