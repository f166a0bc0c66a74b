"""Training: the embedded emoji family now, distillation of real checkpoints later. Never imports nodes/."""
