"""
One density, many processes
===========================

``torchrun --standalone --nproc-per-node 2 examples/train_on_many_machines.py`` trains one density in two processes of
this machine; see the manual of torchrun for several machines. Each process has rows of its own, and all end with the
same model.
"""

import torch
from sklearn.datasets import make_moons
from torch import distributed

from sk_ebm import EBMFlowDensity


def main() -> None:
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    # Where rows lie in files, each process reads its own.
    X, _ = make_moons(20_000, noise=0.1, random_state=0)
    mine = X[rank::size]
    density = EBMFlowDensity(distributed=True, base="gaussian", max_iter=40, random_state=0).fit(mine)
    new, _ = make_moons(1000, noise=0.1, random_state=1)
    print(f"process {rank} of {size}: {len(mine)} rows, {density.score_samples(new).mean():.4f} nats per new row")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
