"""Ray-traced scenes of the project's own, with exact cameras and correspondences: a demo, and training data by seed."""
