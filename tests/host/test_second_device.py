"""Every technique on a device that is not the CPU, without a graphics card: tensors that lie on the wrong one are
refused there as on a card, and weights that do not fit are brought over layer by layer.
"""

import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch

import bootstrap

SOURCE = Path(__file__).parent / "scripts" / "second_device.cpp"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))


@pytest.mark.skipif(COMPILER is None, reason="the second device is made by a C++ compiler, and this machine has none")
def test_the_techniques_act_on_a_second_device_as_on_the_cpu(run_in_host):
    told = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:8]
    library = Path(bootstrap.cache_dir()) / f"second-device-{torch.__version__}-{told}.so"
    found = run_in_host("second_device.py", "main", str(library))
    assert len(found) == 10
    host = found["nothing"][2]
    for name, (error, streamed, fetched) in found.items():
        assert error < 1e-4, f"{name} is {error} off the picture of the CPU"
        assert streamed < 1e-4, f"{name} is {streamed} off where weights stay on the CPU"
        # A card has to be waited for then: once or twice in a step, never in each layer.
        assert fetched <= host + 40, f"{name} fetches {fetched} times in a run of 6 steps, the host {host} times"
