"""Two epochs of the training program's loader, of whatever version of the package is on the path; prints JSON.

Run as a file, so that this repository isn't on the path: see loader.py. Versions differ in what begins an epoch and in
who normalises; both give float32 in channels_last here.
"""

import json
import resource
import sys
import time
from typing import Any

import torch

from stvit.train.cli import parse_args
from stvit.train.data import build_data
from stvit.train.distributed import Process


def start_epoch(data: Any, epoch: int) -> None:
    if hasattr(data, "order"):
        data.order.start(epoch, 0)
    else:
        data.train_sampler.set_epoch(epoch)


def main() -> None:
    args = parse_args(sys.argv[1:])
    data: Any = build_data(args, Process(0, 1, torch.device("cpu")))
    images, first = 0, 0.0
    cpu = time.process_time()
    for epoch in range(2):
        start_epoch(data, epoch)
        began, first = time.perf_counter(), 0.0
        for batch in data.train:
            first = first or time.perf_counter() - began
            images += len(batch[0].to(memory_format=torch.channels_last))
    own = time.process_time() - cpu
    if hasattr(data, "close"):  # of loader processes that outlive an epoch
        data.close()
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = {"images": images, "cpu_s": own, "loaders_cpu_s": ended.ru_utime + ended.ru_stime, "first_batch_s": first}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
