"""Llama 3: the plain model, its sharding table and the published sizes."""

from models.inputs import tokens as inputs
from models.llama.model import Llama, LlamaConfig
from models.llama.presets import PRESETS, build
from models.llama.rules import RULES, WITHOUT_SP

__all__ = ["PRESETS", "RULES", "WITHOUT_SP", "Llama", "LlamaConfig", "build", "inputs"]
