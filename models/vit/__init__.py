"""The Vision Transformer: the plain model, its sharding table and the published sizes."""

from models.inputs import images as inputs
from models.vit.model import ViT, ViTConfig
from models.vit.presets import PRESETS, build
from models.vit.rules import RULES

READS = "images"
"""What a batch holds, where it is not text."""

__all__ = ["PRESETS", "READS", "RULES", "ViT", "ViTConfig", "build", "inputs"]
