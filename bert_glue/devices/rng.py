"""Saves and restores the state of every random generator of this process as tensors, without pickle."""

from __future__ import annotations

import random

import numpy as np
import torch

from bert_glue.devices.device import Device


def seed_generators(seed: int) -> None:
    """Start python's, numpy's and torch's generators, the devices' included, from `seed` (`[0, 2**32)`)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_tensors(device: Device) -> dict[str, torch.Tensor]:
    """State of python's, numpy's, torch's and the device's generators as tensors."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": torch.tensor([version, *numbers], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    device_state = device.random_state()
    return state if device_state is None else {**state, "device": device_state}


def set_random_tensors(state: dict[str, torch.Tensor], device: Device) -> None:
    """Restore the states that `random_tensors` returned."""
    version, *numbers = state["python"].tolist()
    gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(numbers), gauss[0] if gauss else None))
    position, has_gauss, cached = state["numpy_rest"].tolist()
    np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), int(position), int(has_gauss), cached))
    torch.set_rng_state(state["torch"])
    if "device" in state:
        device.set_random_state(state["device"])
