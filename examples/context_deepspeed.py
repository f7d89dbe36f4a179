"""The call of DeepSpeed's DistributedAttention, any heads: torchrun --nproc-per-node 2 FILE."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ms_parallel.context import DistributedAttention


def local_attention(q, k, v):
    """Attend over the whole sequence, [b, s, h, d], with this process's heads."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    attention = DistributedAttention(local_attention, dist.group.WORLD, scatter_idx=2, gather_idx=1)
    for heads, groups in ((8, 8), (8, 2), (6, 3), (4, 1)):
        torch.manual_seed(0)
        whole = [torch.randn(2, 32, n, 16, dtype=torch.float64) for n in (heads, groups, groups)]
        mine = [x.chunk(size, 1)[rank].clone().requires_grad_() for x in whole]
        whole = [x.requires_grad_() for x in whole]
        out, expected = attention(*mine, 0), local_attention(*whole)
        torch.testing.assert_close(out, expected.chunk(size, 1)[rank])
        grad = torch.randn(expected.shape, dtype=torch.float64)
        expected.backward(grad)
        out.backward(grad.chunk(size, 1)[rank])
        for part, x in zip(mine, whole, strict=True):
            torch.testing.assert_close(part.grad, x.grad.chunk(size, 1)[rank])
    print(f"rank {rank}: outputs and gradients are equal")
    dist.destroy_process_group()
