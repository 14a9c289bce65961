"""Who places workers: this machine, or a cluster. Each worker runs the same engine on the shares that it claims."""
