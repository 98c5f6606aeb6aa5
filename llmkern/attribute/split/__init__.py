"""Who took what: joules per launch, and the account of each phase."""
