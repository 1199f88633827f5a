"""The model on the machine: built once, reset for each client."""
