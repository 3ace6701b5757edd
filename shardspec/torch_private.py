"""The only file that imports torch's private names; each with what it is for."""

from torch.distributed.tensor import Placement
from torch.distributed.tensor.placement_types import _StridedShard


def strided_shard(dim: int, split_factor: int) -> Placement:
    """A shard of a dim that another placement has cut into `split_factor` parts first."""
    return _StridedShard(dim, split_factor=split_factor)
