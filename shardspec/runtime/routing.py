"""What a step tells of experts: how many assignments asked for each, how evenly, and how many were dropped."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from shardspec.mesh import degree
from shardspec.plan import ExpertsPlan
from shardspec.runtime.attach import Wiring
from shardspec.runtime.fabric import Fabric


def routed_here(wiring: Wiring, plans: Mapping[str, ExpertsPlan], fabric: Fabric) -> Tensor | None:
    """[modules, experts + 1], float64: this rank's share of what the microbatches since `activate` asked for, which
    over all ranks sums to the whole, by module in the plan's order; None for a model without experts.

    The last column counts what was dropped. Modules of other stages, and experts beyond a module's own, have zeros.
    """
    if not plans:
        return None
    wide = max(plan.count for plan in plans.values())
    mesh, rows = fabric.mesh, list[Tensor]()
    for name, plan in plans.items():
        found = wiring.routed.get(name)
        if not found:
            rows.append(torch.zeros(wide + 1, dtype=torch.float64, device=fabric.device))
            continue
        total = torch.stack(found).sum(0).to(torch.float64)
        copies = mesh.world // mesh["pp"] // degree(mesh, tuple(plan.tokens.sharded))
        asked = F.pad(total[: plan.count], (0, wide - plan.count))
        rows.append(torch.cat((asked, total[plan.count :])) / copies)
    return torch.stack(rows)


def routing_metrics(routed: Tensor | None, plans: Mapping[str, ExpertsPlan]) -> dict[str, Tensor]:
    """Of a model with experts, over all ranks and microbatches of a step:

    - `experts/tokens` [modules, experts]: the assignments that asked for each expert, dropped ones too;
    - `experts/imbalance`: the most that one expert was asked for, over the mean of its module; of the worst module;
    - `experts/dropped`: the assignments that no expert took.
    """
    if routed is None:
        return {}
    asked, dropped = routed[:, :-1], routed[:, -1]
    counts = torch.tensor([plan.count for plan in plans.values()], dtype=routed.dtype, device=routed.device)
    mean = (asked.sum(1) / counts).clamp(min=torch.finfo(routed.dtype).tiny)
    return {
        "experts/tokens": asked,
        "experts/imbalance": (asked.amax(1) / mean).amax(),
        "experts/dropped": dropped.sum(),
    }
