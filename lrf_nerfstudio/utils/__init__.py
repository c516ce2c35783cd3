"""Errors, files, images, progress: what every part needs and none owns."""
