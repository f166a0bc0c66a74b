"""What the benchmarks share, with the host in their process."""

import os
import subprocess
import sys

from demo.server import PACK

CODE = """
import sys
from bench._common import pack_module, start_host
start_host()
import asdm_core.packs, asdm_core.gri
import torch
from bench import _attention, condconv, gri, gri_forms, inheritance, soak, switch, unet

regional = pack_module("nodes.engine.regional")
assert regional.GRI is asdm_core.gri.GRI
assert asdm_core.gri.__spec__.name == "asdm_core.gri"
twice = [name for name, module in sys.modules.items()
         if ".asdm_core." in name and module is not sys.modules["asdm_core." + name.partition(".asdm_core.")[2]]]
assert not twice, twice

# The ways to attend are full attention where there is nothing to leave out, and near to it else.
torch.manual_seed(0)
m = _attention.Map(*torch.randn(3, 1, 64, 2 * 8).unbind(), 2)
assert _attention.error(gri.gri(8, 1)(m), m.wanted) < 1e-5
assert _attention.error(gri_forms.attend(m, 4, 4, 1, "mean")[0], m.wanted) < 1e-5
assert _attention.error(gri_forms.gathered(m, 8, 2, 0), m.wanted) < 1e-5
assert not torch.equal(gri_forms.gathered(m, 4, 2, 0), gri_forms.gathered(m, 4, 2, 3))
assert _attention.error(gri_forms.gathered(m, 4, 2, asdm_core.gri.STEPS), gri.gri(4, 2)(m)) < 1e-5

# A run's multiplications are its own: none of what its beginning was drawn with.
from bench import _savings
savings = _savings.Savings(2, lambda: 0.0)
run = _savings.RUNS["euler-img2img-20-cfg7"]
savings._made(savings.model, run, run.steps)
assert savings._computed == 2 * 2 * 20, savings._computed  # pictures, prompts, steps
print("done")
"""


def test_benchmarks_load_the_core_once_and_attend_and_count_as_they_say(host):
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=PACK,
        env={**os.environ, "COMFYUI_PATH": str(host)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stdout + done.stderr[-4000:]
