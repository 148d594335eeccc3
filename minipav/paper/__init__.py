"""The replication: experiments, statistics, the table of claims, figures; the didactic example and the
theory."""
