"""The sequential part of the inner loop as kernels. They know nothing of the rest of the project.

- `chain.py`: what a kernel of the 2-layer MLP takes and gives
- `plain.py`: that kernel in plain JAX
- `choice.py`: where kernels run; it alone knows the configuration
"""
