"""The replication: experiments, statistics, claims, figures; the didactic example and the theory."""
