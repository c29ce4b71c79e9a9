"""Random numbers as functions of where a run is, so that no random state has to be saved.

A training sample is augmented under seed, epoch and place in the epoch's order; a step (mixup, dropout, drop-path)
under seed, step and process. A run that is cut off anywhere therefore draws, after resuming, what the unbroken one
draws, whatever the number of loader workers.
"""

from __future__ import annotations

import random

import numpy as np
import torch

ORDER, SAMPLE, STEP, WEIGHTS = range(4)  # what a value is for: values for different uses don't meet


def value(seed: int, *place: int) -> int:
    """63 random bits for this place."""
    bits = np.random.SeedSequence([seed % 2**32, *place]).generate_state(2)
    return (int(bits[0]) << 31) ^ int(bits[1])


def set_all(seed: int, *place: int) -> None:
    """Set the states of random, NumPy and PyTorch, on the GPU too where it is in use."""
    number = value(seed, *place)
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.default_generator.manual_seed(number)  # torch.manual_seed takes a stack trace where CUDA has not started
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)


def set_cpu(seed: int, *place: int) -> None:
    """As `set_all`, for a loader: the GPU is not its own."""
    number = value(seed, *place)
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.default_generator.manual_seed(number)
