"""torch.nn's twins: its constructors, forward signatures and state_dict keys on our kernels; and conversion."""
