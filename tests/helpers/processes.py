"""Real processes on gloo for the tests of what happens over ranks."""

import os
import tempfile
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _main(rank, function, world_size, folder, arguments):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(os.path.join(folder, "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    try:
        result = function(rank, world_size, *arguments)
    except BaseException as error:
        result = error
        traceback.print_exc()
    torch.save(result, os.path.join(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def run(function, world_size, *arguments):
    """What ``function(rank, world_size, *arguments)`` returned, or raised, on each of the ranks.

    The function lives at the top of a module, where the processes can import it.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _main, (function, world_size, folder, arguments), nprocs=world_size, start_method="fork", join=True
        )
        return [torch.load(os.path.join(folder, f"{rank}.pt"), weights_only=False) for rank in range(world_size)]
