"""One call that makes a run repeatable."""

from __future__ import annotations

import random

import numpy as np
import torch

from geta.errors import ConfigError


def seed_everything(seed: int) -> None:
    """Seed every generator that training draws from: Python's `random`, numpy's global one and torch's (all devices).

    seed: an integer in [0, 2**32 - 1], the range that numpy's global generator accepts.

    Raises ConfigError for a seed outside that range. Changes no other setting: deterministic kernels and thread counts stay the
    caller's choice.
    """
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed = {seed}: a seed is an integer from 0 to {2**32 - 1}")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - third-party code draws from numpy's global generator, so that one must be seeded
    torch.manual_seed(seed)
