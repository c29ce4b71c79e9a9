"""A stream as timm's are, of PNG files: shards shared out over processes and loader processes, a shuffle buffer.

Importing this module puts it in the place of `timm.data.create_dataset`, for the programs that `train_killer.py` runs.
"""

import random
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from stvit.train import listed

SHARDS = 4


class Reader:
    """What the readers of timm have in common, under their names."""

    def __init__(self, root, split, is_training, seed, num_samples):
        folder = Path(root, split)
        self.class_to_idx = {name: i for i, name in enumerate(sorted(path.name for path in folder.iterdir()))}
        files = sorted(folder.rglob("*.png"), key=lambda path: (path.stem, path.parent.name))
        self.num_samples = num_samples or len(files)
        self.shards = [files[shard::SHARDS] for shard in range(SHARDS)]
        self.is_training, self.seed = is_training, seed
        self.dist_rank, self.dist_num_replicas = 0, 1
        if dist.is_initialized():
            self.dist_rank, self.dist_num_replicas = dist.get_rank(), dist.get_world_size()
        self.random = None

    def __iter__(self):
        worker = get_worker_info()
        workers, number, seed = (worker.num_workers, worker.id, worker.seed) if worker else (1, 0, self.seed)
        if self.random is None:  # as webdataset's shuffle, it goes on from one iteration to the next
            self.random = random.Random(seed)
        shards = list(self.shards)
        if self.is_training:
            random.Random(self.seed).shuffle(shards)
        mine = shards[self.dist_rank * workers + number :: self.dist_num_replicas * workers]
        files = [file for shard in mine for file in shard]
        if self.is_training:
            self.random.shuffle(files)
        for file in files:
            yield Image.open(file), self.class_to_idx[file.parent.name]


class Stream(IterableDataset):
    def __init__(self, reader):
        self.reader = reader

    def __iter__(self):
        yield from self.reader


def create_dataset(name, root, split, is_training, seed, num_samples=None, **options):
    assert torch.utils.data.get_worker_info() is None
    return Stream(Reader(root, split, is_training, seed, num_samples))


listed.create_dataset = create_dataset
listed.PACKAGES = {}
