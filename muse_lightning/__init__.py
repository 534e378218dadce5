"""muse-lightning: pretraining on long contexts with Multipole Semantic Attention, as a PyTorch Lightning recipe."""

__version__ = "0.1.0"
