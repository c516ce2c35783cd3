"""What nerfstudio sees: the method, its trainer, pipeline, data and model."""

import warnings

from lrf_nerfstudio.utils.deprecations import no_jit_warning

# PyTorch deprecates some of what nerfstudio calls, and no user can mend that. nerfstudio's own commands load plugins
# last, so they have warned of their own imports by now.
warnings.filterwarnings("ignore", r"`torch\.cuda\.amp\.", FutureWarning, r"nerfstudio\.")
warnings.filterwarnings("ignore", r"Using torch\.cross without", UserWarning, r"nerfstudio\.cameras\.camera_utils")
warnings.filterwarnings("ignore", "To copy construct from a tensor", UserWarning, r"nerfstudio\.cameras\.camera_utils")
with no_jit_warning():
    import nerfstudio.cameras.camera_utils  # noqa: F401
