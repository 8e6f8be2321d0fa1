"""Stands in for fvcore where it is not installed: what of its interface the adapters meet, in plain PyTorch.

After fvcore 0.1.5.post20221221.
"""
