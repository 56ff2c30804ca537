"""The steps of the main job, one call each: what the cells of the notebooks call, and a test can
reach."""
