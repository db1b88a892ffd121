"""Fused operations of the model, differentiable to second order: the loss and attention."""

from kernels.loss import score_weighted_loss

__all__ = ["score_weighted_loss"]
