"""Training under stock trainers and stock losses: balance and monitoring of the routers."""
