"""The loop around the step: configuration, progress, checkpoints, resuming, the run folder."""
