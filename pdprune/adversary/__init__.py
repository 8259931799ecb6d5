"""What may be done to the not-kept nodes, and who chooses the worst of it."""
