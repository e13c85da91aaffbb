"""The sequential part of the inner loop as kernels. They know nothing of the rest of the project.

- `chain.py`: what a kernel takes and gives, of the linear inner network or of the 2-layer MLP
- `plain.py`: both in plain JAX
- `hopper.py`, `hopper_linear.py`: each on a GPU, with the modules that only these import
- `choice.py`: where kernels run; it alone knows the configuration
"""
