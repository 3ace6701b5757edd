"""The published sizes of GPT-2, and a small one for bytes."""

from models.gpt2.model import GPT2, GPT2Config

PRESETS = {
    # 957,184 parameters; a vocabulary of bytes
    "debug": GPT2Config(dim=128, n_layers=4, n_heads=8, vocab_size=256, dropout=0.0),
    "gpt2": GPT2Config(dim=768, n_layers=12, n_heads=12),
    "gpt2-medium": GPT2Config(dim=1024, n_layers=24, n_heads=16),
    "gpt2-large": GPT2Config(dim=1280, n_layers=36, n_heads=20),
    "gpt2-xl": GPT2Config(dim=1600, n_layers=48, n_heads=25),
}


def build(preset: str | GPT2Config) -> GPT2:
    """Build the model of a preset's name, or of a config, on the current default device."""
    return GPT2(PRESETS[preset] if isinstance(preset, str) else preset)
