"""Mathematics that methods share: linear algebra, metrics of the loss, solvers, the loop that keeps the best."""
