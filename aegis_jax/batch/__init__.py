"""Many erasures by many workers: a plan that does not change, a ledger of who does what, and the loop of a worker."""
