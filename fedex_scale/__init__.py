"""Federated LoRA fine-tuning of 7B-9B models with exact (FedEx-LoRA) aggregation."""

__version__ = "0.1.0"
