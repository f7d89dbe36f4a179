"""FSDP2 and context parallelism on the same ranks: torchrun --nproc-per-node 2 FILE."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ms_ops import attention
from ms_parallel.context import AttnMask, ContextAttention, CPTopology, SeqLayout, plan_attention


class Block(torch.nn.Module):
    def __init__(self, attend):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out, self.attend = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32), attend

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).unbind(2)
        return x + self.out(self.attend(q, k, v).flatten(2))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (dist.get_world_size(),))
    layout, mask = SeqLayout.zigzag(64, mesh.size()), AttnMask.causal()
    plan = plan_attention(layout, mask, heads=(4, 4), head_dims=(8, 8))
    ours = fully_shard(Block(ContextAttention(plan, CPTopology(mesh))), mesh=mesh)
    whole, x = Block(lambda q, k, v: attention(q, k, v, causal=True)), torch.randn(2, 64, 32)
    optimizers = [torch.optim.AdamW(model.parameters()) for model in (ours, whole)]
    for _ in range(5):
        losses = [m(t).square().mean() for m, t in ((ours, layout.shard(x, rank, 1)), (whole, x))]
        sum(losses).backward()
        [(optimizer.step(), optimizer.zero_grad()) for optimizer in optimizers]
        dist.all_reduce(mean := losses[0].detach() / mesh.size())
        torch.testing.assert_close(mean, losses[1].detach())
    print(f"rank {rank}: losses are equal")
    dist.destroy_process_group()
