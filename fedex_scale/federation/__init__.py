"""The two sides of a round, what they leave on disk, and how a run goes on from there."""
