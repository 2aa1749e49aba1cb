"""What a file is, as plain data: bundles and graphs without torch, checkpoints with it. Nothing in it is executed."""
