"""The effect of each part of the method: students of one teacher that differ in one setting, over several seeds."""
