"""What one does with a finished run: talk to its model, serve it, push it to the hub."""
