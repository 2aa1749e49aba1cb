"""A hundred thousand hostile inputs, and what the readers of comkd do with them."""
