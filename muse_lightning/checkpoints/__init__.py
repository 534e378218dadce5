"""Checkpoints that survive: written whole or not at all, checksummed, kept by step, saved when a run is preempted."""
