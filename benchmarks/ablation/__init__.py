"""What each part of the method is worth: students of one teacher that differ in one thing, over several seeds."""
