"""SAE Relay."""
