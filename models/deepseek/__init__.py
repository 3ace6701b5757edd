"""DeepSeek-V3: the plain model, its sharding table, how its routers are balanced, and the published size."""

from models.deepseek.balance import balanced
from models.deepseek.balance import balanced as update_buffers
from models.deepseek.model import DeepSeek, DeepSeekConfig
from models.deepseek.presets import PRESETS, build
from models.deepseek.rules import RULES, WITHOUT_SP
from models.inputs import tokens as inputs

__all__ = [
    "PRESETS",
    "RULES",
    "WITHOUT_SP",
    "DeepSeek",
    "DeepSeekConfig",
    "balanced",
    "build",
    "inputs",
    "update_buffers",
]
