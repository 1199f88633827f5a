"""The process: ranks, faults, phases, progress, errors, seeds."""
