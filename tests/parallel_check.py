"""Run by torchrun in `test_parallel.py`: a sharded model against a whole one. Arguments: tp or ep, a shape, a folder."""

import sys

import torch
import torch.distributed as dist
from conftest import SHAPES, spread, tiny_config
from transformers.distributed import DistributedConfig

from hagmoe_hf import HagMoeModel

kind, shape, folder = sys.argv[1:]
dist.init_process_group("gloo")
whole = spread(HagMoeModel(tiny_config(**SHAPES[shape])), scale=0.2)
if dist.get_rank() == 0:
    whole.save_pretrained(folder)
dist.barrier()
sizes = {"tp_size": 2} if kind == "tp" else {"tp_size": 2, "ep_size": 2}
sharded = HagMoeModel.from_pretrained(folder, distributed_config=DistributedConfig(**sizes)).eval()
ids = torch.randint(3, 99, (3, 9), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    difference = (sharded(ids).last_hidden_state - whole(ids).last_hidden_state).abs().max().item()
local = sharded.layers[1].mlp.experts.down_proj if kind == "ep" else sharded.layers[0].attention.q_proj.weight
if dist.get_rank() == 0:
    print(f"RESULT {difference} {local.to_local().shape[0] if hasattr(local, 'to_local') else local.shape[0]}")
dist.destroy_process_group()
