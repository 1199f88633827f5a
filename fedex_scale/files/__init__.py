"""What lies on disk: adapters, base models, the layout of a run."""
