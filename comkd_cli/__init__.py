"""comkd: distil a large CLIP model into a small one, prove what it kept, and pack it for devices."""
