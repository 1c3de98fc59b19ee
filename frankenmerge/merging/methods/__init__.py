"""How tensors of several donors become one."""
