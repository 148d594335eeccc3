"""minipav: "Rewarding Progress: Scaling Automated Process Verifiers for LLM Reasoning" (arXiv 2410.08146), from scratch."""
