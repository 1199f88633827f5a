"""What a client learns: a short file a kind of task."""
