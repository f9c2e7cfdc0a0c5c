"""What an erasure did, measured: the rate of the concept, and what is left of everything else."""
