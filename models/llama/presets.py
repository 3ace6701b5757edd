"""The published sizes of Llama 3, and a small one for bytes."""

from models.llama.model import Llama, LlamaConfig

PRESETS = {
    # 951,424 parameters; a vocabulary of bytes
    "debug": LlamaConfig(
        dim=128, n_layers=4, n_heads=8, n_kv_heads=4, ffn_dim=448, vocab_size=256, max_seq_len=2048
    ),
    # Llama 3.2
    "1b": LlamaConfig(
        dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, ffn_dim=8192,
        max_seq_len=131072, rope_scale=32.0, tied=True,
    ),
    # Llama 3
    "8b": LlamaConfig(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, ffn_dim=14336),
    "70b": LlamaConfig(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, ffn_dim=28672),
    # Llama 3.1
    "405b": LlamaConfig(
        dim=16384, n_layers=126, n_heads=128, n_kv_heads=8, ffn_dim=53248,
        max_seq_len=131072, rope_scale=8.0,
    ),
}  # fmt: skip


def build(preset: str | LlamaConfig) -> Llama:
    """Build the model of a preset's name, or of a config, on the current default device."""
    return Llama(PRESETS[preset] if isinstance(preset, str) else preset)
