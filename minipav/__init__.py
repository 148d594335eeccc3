"""minipav: process advantage verifiers, small and from scratch (arXiv 2410.08146)."""
