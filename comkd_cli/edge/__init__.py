"""What a bundle's predict.py is made of: no torch, no other part of comkd."""
