"""The Vision Transformer as a plain `nn.Module` that knows nothing of meshes.

After "An Image is Worth 16x16 Words" (arXiv 2010.11929), with the parameter names and shapes of timm's.

Names carry dims: B batch, C channels of the image, Y and X its rows and columns, D width, N patches, T tokens
(the patches and one for the class), H heads, d a head's width, F feed-forward width, K classes.
"""

import attrs
import torch
import torch.nn.functional as F
from torch import nn

INIT_STD = 0.02


@attrs.frozen(kw_only=True)
class ViTConfig:
    """The sizes of one Vision Transformer; the defaults are ImageNet's."""

    dim: int
    n_layers: int
    n_heads: int
    patch_size: int = 16
    image_size: int = 224
    channels: int = 3
    n_classes: int = 1000
    norm_eps: float = 1e-6
    head_dim: int = attrs.field(default=attrs.Factory(lambda self: self.dim // self.n_heads, takes_self=True))
    ffn_dim: int = attrs.field(default=attrs.Factory(lambda self: 4 * self.dim, takes_self=True))

    @property
    def n_patches(self) -> int:
        """How many patches an image has."""
        return (self.image_size // self.patch_size) ** 2


class Linear(nn.Linear):
    """A product and a bias; the weight is drawn from a normal cut at two deviations, the bias starts at zero."""

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)
        nn.init.zeros_(self.bias)


class PatchEmbed(nn.Module):
    """Cuts the image into patches and maps each to a vector: a convolution that moves by its own size."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.channels, config.dim, config.patch_size, stride=config.patch_size)

    def forward(self, images_BCYX: torch.Tensor) -> torch.Tensor:
        return self.proj(images_BCYX).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention of every token to every other; one product makes queries, keys and values.

    The number of heads is read off that product's output, so a rank may hold only some of them.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        inner = config.n_heads * config.head_dim
        self.qkv = Linear(config.dim, 3 * inner)
        self.proj = Linear(inner, config.dim)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        B, T, _ = x_BTD.shape
        qkv_3BHTd = self.qkv(x_BTD).reshape(B, T, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        q_BHTd, k_BHTd, v_BHTd = qkv_3BHTd.unbind(0)
        o_BHTd = F.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTd)
        return self.proj(o_BHTd.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    """fc2(gelu(fc1 x))."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.dim, config.ffn_dim)
        self.fc2 = Linear(config.ffn_dim, config.dim)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x_BTD)))


class Block(nn.Module):
    """One layer: attention and feed-forward, each on a normed copy and added back."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        h_BTD = x_BTD + self.attn(self.norm1(x_BTD))
        return h_BTD + self.mlp(self.norm2(h_BTD))


class ViT(nn.Module):
    """Images in, logits out, read off the class token."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim))
        self.pos_embed = nn.Parameter(torch.empty(1, config.n_patches + 1, config.dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.head = Linear(config.dim, config.n_classes)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=INIT_STD)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits [B, K] for images [B, C, Y, X]."""
        patches_BND = self.patch_embed(images)
        cls_B1D = self.cls_token.expand(images.shape[0], -1, -1)
        x_BTD = torch.cat((cls_B1D, patches_BND), dim=1) + self.pos_embed
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(self.norm(x_BTD)[:, 0])
