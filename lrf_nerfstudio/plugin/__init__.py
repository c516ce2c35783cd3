"""What nerfstudio sees: the method, its trainer, pipeline, data and model."""

import warnings

# PyTorch deprecates some of what nerfstudio calls, and no user can mend that. nerfstudio's own commands load plugins
# last, so they have warned of their own imports by now.
warnings.filterwarnings("ignore", r"`torch\.cuda\.amp\.", FutureWarning, r"nerfstudio\.")
warnings.filterwarnings("ignore", r"Using torch\.cross without", UserWarning, r"nerfstudio\.cameras\.camera_utils")
with warnings.catch_warnings():
    # PyTorch attributes this one to itself: only what this import says is silenced, not other people's calls.
    warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning)
    import nerfstudio.cameras.camera_utils  # noqa: F401
