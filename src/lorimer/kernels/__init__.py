"""The few numeric operations that decide the speed.

reference.py   each in plain PyTorch: forward and backward, right on any device
dispatch.py    each as one autograd operation that the model calls
"""
