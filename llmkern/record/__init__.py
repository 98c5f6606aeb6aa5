"""Left half of the pipeline: everything that needs the device, ending in the run folder."""
