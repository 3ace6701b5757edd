"""GPT-2: the plain model, its sharding table and the published sizes."""

from models.gpt2.model import GPT2, GPT2Config
from models.gpt2.presets import PRESETS, build
from models.gpt2.rules import RULES, WITHOUT_SP
from models.inputs import tokens as inputs

__all__ = ["GPT2", "PRESETS", "RULES", "WITHOUT_SP", "GPT2Config", "build", "inputs"]
