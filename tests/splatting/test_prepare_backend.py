"""What `prepare_backend` is for: a render imports nothing, because a viewer may stop it anywhere."""

import subprocess
import sys

SCRIPT = """
import sys, torch
from lrf_nerfstudio.splatting import Gaussians, RasterSettings, prepare_backend, rasterize
prepare_backend("cpu")
before = set(sys.modules)
generator = torch.Generator().manual_seed(0)
random = lambda *shape: torch.rand(*shape, generator=generator)
means = random(50, 3) + torch.tensor([0, 0, 2])
gaussians = Gaussians(means, random(50, 4), random(50, 3) / 9, random(50), random(50, 4))
K = torch.tensor([[[8.0, 0.0, 8.0], [0.0, 8.0, 8.0], [0.0, 0.0, 1.0]]])
settings = RasterSettings(width=16, height=16, render_depth=True)
assert rasterize(gaussians, torch.eye(4)[None], K, settings).alpha.mean() > 0
print(*sorted(set(sys.modules) - before))
"""


def test_the_first_render_imports_nothing():
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
