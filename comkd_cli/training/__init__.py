"""What both stages of training share: the loop, its checkpoints, optimizers and schedules."""
