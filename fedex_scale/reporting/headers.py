"""What the columns of a report's tables hold, a sentence each."""

from __future__ import annotations

SCORES = {
    "task": "lm-eval's task, and its metric where that is not the share of exact matches.",
    "examples": "How many examples were scored.",
    "before": "The base model's score, before the first round.",
    "after": "The score after the last round that was scored.",
}
CLIENTS = {
    "client": "The client's number.",
    "examples": "Examples that it trained on.",
    "steps": "Optimizer steps that it took in this round.",
    "loss": "Training loss of its first and of its last step in this round.",
    "tokens/s": "Tokens of its examples, prompts included, over the time that it took.",
    "time": "Wall time of its training.",
}
DEVIATION = {
    "round": "The round, counted from 1.",
    "of the change": "Norm of the residual over that of the round's ideal change: the share of the "
    "work that averaging the factors alone would lose.",
    "scaled norm": "Norm of the residual over the root of the layers' size, to compare models.",
    "cosine": "Between the update of averaged factors and the ideal one; 1: the same direction.",
    "norm ratio": "Norm of the update of averaged factors over that of the ideal one; 1: as large.",
    "drift": "Distance between the clients' updates over what they changed together; above 100% "
    "they are further apart than they moved together.",
    "eff. rank": "How many columns a layer's residual really needs, by the entropy of its singular "
    "values; mean over the layers.",
}
OBSERVED = {
    "the paper": "What FedEx-LoRA's authors found in their models (arXiv:2410.09432).",
    "quotient": "Quotient of scaled norms, each a root mean square over layers; and whether it "
    "is as the paper found.",
}
KEPT = {
    "round": "The round, counted from 1.",
    "added, of the update": "Norm of what the round added beside the adapter, over that of its "
    "whole update.",
    "kept": "How much of that the forward pass sees; 100% is exact.",
    "of all rounds together": "The same for the sum over all rounds so far.",
    "largest part": "The layer in which the round added most.",
}
COMMUNICATION = {
    "one client": "The method whose traffic it is; the first line is what this run does.",
    "rank": "Columns of the update that a client receives.",
    "up a round": "What a client sends to the server: numbers, and bytes.",
    "down a round": "What a client receives from the server: numbers, and bytes.",
    "all rounds": "Both ways over all rounds, without the initial model.",
    "initial model": "The base, which a client gets once.",
}
DATA = {"examples": "Examples that the client holds."}
EXPECTED = {
    "Q over V": ("above 1", lambda quotient: quotient > 1),
    "deeper half over shallower half": ("below 1", lambda quotient: quotient < 1),
    "last round over first": ("below 1", lambda quotient: quotient < 1),
}
"""What the paper observed of each quotient of deviations."""
