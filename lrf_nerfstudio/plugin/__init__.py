"""What nerfstudio sees: the method, its trainer, pipeline, data and model."""
