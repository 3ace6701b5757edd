"""The published size of Mixtral, and a small one for bytes."""

from models.mixtral.model import Mixtral, MixtralConfig

PRESETS = {
    # 920,128 parameters; a vocabulary of bytes
    "debug": MixtralConfig(
        dim=64, n_layers=4, n_heads=8, n_kv_heads=4, head_dim=16, ffn_dim=128, vocab_size=256, max_seq_len=2048,
        rope_theta=10000.0,
    ),
    # 46,702,792,704 parameters
    "8x7b": MixtralConfig(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, ffn_dim=14336),
}  # fmt: skip


def build(preset: str | MixtralConfig) -> Mixtral:
    """Build the model of a preset's name, or of a config, on the current default device."""
    return Mixtral(PRESETS[preset] if isinstance(preset, str) else preset)
