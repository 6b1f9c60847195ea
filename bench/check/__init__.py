"""Values: every op against its definition, on this machine."""
