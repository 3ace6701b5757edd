"""The experts of a mixture as one plain module: stacked SwiGLUs, and a token's rows of those that it chose.

Names carry dims: N tokens, D width, F an expert's width, E experts, k choices of a token, M = N k rows.
"""

import torch
import torch.nn.functional as F
from torch import nn

ALIGNMENT = 16  # bytes: torch.nn.functional.grouped_mm wants matrices whose rows begin at multiples of it


class Experts(nn.Module):
    """E feed-forwards, stacked: sum over a token's choices e of weight_e * w2_e(silu(w1_e x) * w3_e x).

    How many experts there are is read off the weights, so a rank may hold only some of them; ids count from its first.
    """

    def __init__(self, n_experts: int, dim: int, ffn_dim: int, std: float, out_std: float) -> None:
        super().__init__()
        self.std, self.out_std = std, out_std
        self.w1 = nn.Parameter(torch.empty(n_experts, ffn_dim, dim))
        self.w2 = nn.Parameter(torch.empty(n_experts, dim, ffn_dim))
        self.w3 = nn.Parameter(torch.empty(n_experts, ffn_dim, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights from normal distributions."""
        nn.init.normal_(self.w1, std=self.std)
        nn.init.normal_(self.w2, std=self.out_std)
        nn.init.normal_(self.w3, std=self.std)

    def forward(self, hidden_ND: torch.Tensor, ids_Nk: torch.Tensor, weights_Nk: torch.Tensor) -> torch.Tensor:
        """Return [N, D]: each token's chosen experts, weighted and summed. No token is dropped, and N may be 0."""
        experts, choices = self.w1.shape[0], ids_Nk.shape[1]
        ids_M = ids_Nk.flatten()
        order_M = ids_M.argsort(stable=True)
        rows_M = order_M // choices
        counts_E = torch.bincount(ids_M, minlength=experts)
        x_MD = hidden_ND[rows_M]
        h_MF = F.silu(grouped(x_MD, self.w1, counts_E)) * grouped(x_MD, self.w3, counts_E)
        y_MD = grouped(h_MF, self.w2, counts_E) * weights_Nk.flatten()[order_M].unsqueeze(1).to(h_MF.dtype)
        return torch.zeros_like(hidden_ND).index_add(0, rows_M, y_MD)


def grouped(x_Mi: torch.Tensor, w_Eoi: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """Return [M, o]: the first counts[0] rows by the first matrix, the next counts[1] by the second, and so on."""
    aligned = all(length * w_Eoi.itemsize % ALIGNMENT == 0 for length in w_Eoi.shape[1:])
    if x_Mi.is_cuda and w_Eoi.dtype == torch.bfloat16 and aligned:
        return fused(x_Mi, w_Eoi, counts_E)
    parts = x_Mi.split(counts_E.tolist())
    return torch.cat([part @ w_oi.T for part, w_oi in zip(parts, w_Eoi.unbind(), strict=True)])


def fused(x_Mi: torch.Tensor, w_Eoi: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """Return the same in one call, which does not read the counts on the host."""
    return F.grouped_mm(x_Mi, w_Eoi.transpose(1, 2), offs=counts_E.cumsum(0).to(torch.int32))
