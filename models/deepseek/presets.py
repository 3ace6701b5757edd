"""The published size of DeepSeek-V3, and a small one for bytes.

The sizes of 671b are those of section 4.2 of arXiv 2412.19437 and of the configuration published beside the weights
(deepseek-ai/DeepSeek-V3, config.json; YaRN by a factor of 40 included). They make the published 671B of the main
model, without the module that predicts a second token: 671,026,419,200, which counts the 256 entries of each of the
58 selection biases (buffers here: no gradient reaches them).
"""

from models.deepseek.model import DeepSeek, DeepSeekConfig

PRESETS = {
    # 786,304 parameters; a vocabulary of bytes
    "debug": DeepSeekConfig(
        dim=64, n_layers=4, n_dense_layers=1, n_heads=4, q_rank=48, kv_rank=32, nope_dim=16, rope_dim=8, v_dim=16,
        ffn_dim=256, moe_dim=64, n_experts=16, top_k=4, n_groups=4, top_groups=2, vocab_size=256, max_seq_len=2048,
    ),
    "671b": DeepSeekConfig(
        dim=7168, n_layers=61, n_dense_layers=3, n_heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64,
        v_dim=128, ffn_dim=18432, moe_dim=2048, n_experts=256, top_k=8, n_groups=8, top_groups=4,
        max_seq_len=163840, rope_factor=40.0,
    ),
}  # fmt: skip


def build(preset: str | DeepSeekConfig) -> DeepSeek:
    """Build the model of a preset's name, or of a config, on the current default device."""
    return DeepSeek(PRESETS[preset] if isinstance(preset, str) else preset)
