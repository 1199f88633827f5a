"""What a run needs of a machine, and what a machine has."""
