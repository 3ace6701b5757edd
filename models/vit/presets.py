"""The published sizes of the Vision Transformer, and a small one for images of 32 x 32."""

from models.vit.model import ViT, ViTConfig

PRESETS = {
    # 809,354 parameters
    "debug": ViTConfig(dim=128, n_layers=4, n_heads=8, patch_size=4, image_size=32, n_classes=10),
    "b16": ViTConfig(dim=768, n_layers=12, n_heads=12),
    "l16": ViTConfig(dim=1024, n_layers=24, n_heads=16),
}


def build(preset: str | ViTConfig) -> ViT:
    """Build the model of a preset's name, or of a config, on the current default device."""
    return ViT(PRESETS[preset] if isinstance(preset, str) else preset)
