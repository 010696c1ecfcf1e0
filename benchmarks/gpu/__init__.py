"""What the GPU path reaches on one GPU: see __main__."""
