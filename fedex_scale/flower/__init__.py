"""An app for Flower: it imports flwr alone, and calls the commands of a federation."""
