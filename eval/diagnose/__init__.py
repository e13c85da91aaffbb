"""`python -m eval diagnose`: what the TTT layers do beside attention, record by record."""
